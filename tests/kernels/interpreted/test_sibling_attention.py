"""Test the Triton code of sibling attention, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch

from infer_align_kernels import PrefixTable, sibling_attention_at
from infer_align_kernels.sibling_attention import triton
from tests.kernels import float64
from tests.kernels.test_sibling_attention import TOLERANCE, case


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 1),
        (3, 4, 2, 5, 70, 24),
        (2, 4, 4, 20, 33, 16),
        (2, 6, 1, 13, 3, 5),
        (2, 2, 2, 3, 0, 4),
        # Prefixes in three parts; the rows use one, two or all of them.
        (4, 4, 2, 3, 530, 20),
    ],
    ids=str,
)
def test_each_sibling_attends_to_its_prefix_and_itself(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = case(*shape, dtype)
    _, prefix_keys, prefix_values, _, _, lengths = inputs
    # Columns before a row's prefix are never read.
    for row, length in enumerate(lengths.tolist()):
        for tensor in (prefix_keys, prefix_values):
            tensor[row, :, : tensor.shape[2] - length] = torch.nan
    result = triton.sibling_attention(*inputs, scale=shape[-1] ** -0.5)
    expected = float64.attention(*inputs)
    torch.testing.assert_close(result.double(), expected, atol=TOLERANCE[dtype], rtol=0)


def test_a_row_does_not_depend_on_its_batch() -> None:
    inputs = case(5, 4, 2, 6, 40, 16, torch.float32)
    together = triton.sibling_attention(*inputs, scale=0.25)
    for b in (0, 2, 4):
        alone = triton.sibling_attention(*(tensor[b : b + 1] for tensor in inputs), scale=0.25)
        assert torch.equal(alone, together[b : b + 1])


def test_a_row_does_not_depend_on_the_number_of_parts_of_its_batch() -> None:
    inputs = case(4, 4, 2, 3, 530, 16, torch.float32)
    inputs[5][:] = torch.tensor([0, 100, 256, 530])
    together = triton.sibling_attention(*inputs, scale=0.25)
    query, keys, values, own_keys, own_values, lengths = inputs
    assert triton.tiles(6, 16, torch.float32).part == 256
    for b, length in enumerate(lengths.tolist()):
        # Alone, a row has no columns before its prefix, and perhaps one part.
        row = slice(b, b + 1)
        prefix = (keys[row, :, 530 - length :], values[row, :, 530 - length :])
        own = (own_keys[row], own_values[row], lengths[row])
        alone = triton.sibling_attention(query[row], *prefix, *own, scale=0.25)
        assert torch.equal(alone, together[row])


@pytest.mark.parametrize("shape", [(0, 2, 2, 3, 4, 4), (2, 2, 1, 0, 4, 4)], ids=str)
def test_an_empty_query_gives_an_empty_result(shape: tuple[int, ...]) -> None:
    rows, heads, _, siblings, _, dim = shape
    result = triton.sibling_attention(*case(*shape, torch.float32), scale=1.0)
    assert result.shape == (rows, heads, siblings, dim)


def test_strided_numbers_of_a_head_are_refused() -> None:
    inputs = list(case(2, 4, 2, 5, 7, 8, torch.float32))
    inputs[1] = inputs[1].transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match="contiguous"):
        triton.sibling_attention(*inputs, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(3, 4, 2, 5, 70, 24), (2, 6, 1, 13, 3, 5), (2, 2, 2, 3, 0, 4), (4, 4, 2, 3, 530, 16)],
    ids=str,
)
def test_a_table_gives_the_bits_of_the_tensors_and_padding_changes_no_row(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = case(*shape, dtype)
    expected = triton.sibling_attention(*inputs, scale=0.25)
    result = by_table(inputs, capacity=1024)
    assert torch.equal(result[: shape[0]], expected)
    assert result[shape[0] :].isfinite().all()


def by_table(inputs: tuple[torch.Tensor, ...], capacity: int) -> torch.Tensor:
    """Attend with a table of two layers, the second of which is used, and two rows of padding."""
    query, keys, values, own_keys, own_values, lengths = inputs
    table = PrefixTable(2, query.shape[-1], query.dtype, query.device)
    padded = [torch.cat([each, each[:1], each[:1]]) for each in (query, own_keys, own_values)]
    padded_lengths = torch.cat([lengths, torch.zeros(2, dtype=lengths.dtype)])
    unread = torch.full_like(keys, torch.nan)
    with table.pointing_to([unread, keys], [unread, values]):
        return sibling_attention_at(
            padded[0], table, 1, padded[1], padded[2], padded_lengths, capacity, 0.25
        )
