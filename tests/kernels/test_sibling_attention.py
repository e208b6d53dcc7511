"""Test sibling attention on CPU against one softmax per sibling in float64."""

from __future__ import annotations

import pytest
import torch

from infer_align_kernels import PrefixTable, sibling_attention, sibling_attention_at
from tests.kernels import float64

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def case(
    rows: int, heads: int, kv_heads: int, siblings: int, columns: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Make views as an engine has them: transposed heads, and a prefix in a longer buffer."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    query = random(rows, siblings, heads, dim).transpose(1, 2)
    keys, values = random(2, rows, kv_heads, columns + 9, dim)[:, :, :, :columns]
    own_keys, own_values = random(2, rows, siblings, kv_heads, dim).transpose(2, 3)
    lengths = torch.randint(0, columns + 1, (rows,), generator=generator)
    lengths[:1] = 0
    lengths[-1:] = columns
    return query, keys, values, own_keys, own_values, lengths


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 1),
        (3, 4, 2, 5, 7, 8),
        (2, 4, 4, 20, 33, 16),
        (4, 6, 1, 3, 1, 5),
        (2, 2, 2, 3, 0, 4),
        (0, 2, 2, 3, 4, 4),
        (2, 2, 1, 0, 4, 4),
    ],
    ids=str,
)
def test_each_sibling_attends_to_its_prefix_and_itself(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = case(*shape, dtype)
    result = sibling_attention(*inputs)
    assert result.dtype == dtype
    expected = float64.attention(*inputs)
    torch.testing.assert_close(result.double(), expected, atol=TOLERANCE[dtype], rtol=0)


def test_a_row_depends_neither_on_its_batch_nor_on_its_padding() -> None:
    inputs = case(5, 4, 2, 6, 40, 16, torch.float32)
    together = sibling_attention(*inputs)
    for b in range(5):
        alone = sibling_attention(*(tensor[b : b + 1] for tensor in inputs))
        torch.testing.assert_close(alone, together[b : b + 1], atol=1e-6, rtol=1e-6)
    query, keys, values, own_keys, own_values, lengths = inputs
    padding = torch.full_like(keys[:, :, :7], 1e4)
    padded_keys = torch.cat([padding, keys], dim=2)
    padded_values = torch.cat([padding, values], dim=2)
    padded = sibling_attention(query, padded_keys, padded_values, own_keys, own_values, lengths)
    torch.testing.assert_close(padded, together, atol=1e-6, rtol=1e-6)


def test_a_scale_replaces_the_default() -> None:
    query, *rest = case(2, 2, 2, 3, 5, 4, torch.float32)
    doubled = sibling_attention(query * 2, *rest)
    torch.testing.assert_close(sibling_attention(query, *rest, scale=2 * 4**-0.5), doubled)


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, torch.zeros(2, 3, 5, 8), "query: 3 heads over 2"),
        (1, torch.zeros(2, 8), "query and prefix_keys"),
        (2, torch.zeros(2, 2, 6, 8), "prefix_values: shape"),
        (3, torch.zeros(2, 2, 4, 8), "own_keys: shape"),
        (4, torch.zeros(2, 2, 5, 8, dtype=torch.float16), "own_values: torch.float16"),
        (5, torch.zeros(2), "lengths: torch.float32"),
        (5, torch.zeros(3, dtype=torch.int64), "lengths: shape"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(
    index: int, wrong: torch.Tensor, message: str
) -> None:
    inputs = list(case(2, 4, 2, 5, 7, 8, torch.float32))
    inputs[index] = wrong
    with pytest.raises(ValueError, match=message):
        sibling_attention(*inputs)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_named(scale: float) -> None:
    with pytest.raises(ValueError, match=f"scale: {scale}"):
        sibling_attention(*case(1, 1, 1, 1, 1, 1, torch.float32), scale=scale)


def by_table(
    inputs: tuple[torch.Tensor, ...], padding: int, capacity: int = 1024, layer: int = 1
) -> torch.Tensor:
    """Attend with the second layer of a table, and with rows of padding after those of the case."""
    query, keys, values, own_keys, own_values, lengths = inputs
    table = PrefixTable(2, keys.shape[-1], keys.dtype, keys.device)
    rows = [*range(len(query)), *[0] * padding]
    padded_lengths = torch.cat([lengths, lengths.new_zeros(padding)])
    own = (own_keys[rows], own_values[rows], padded_lengths)
    with table.pointing_to([torch.zeros_like(keys), keys], [torch.zeros_like(values), values]):
        return sibling_attention_at(query[rows], table, layer, *own, capacity)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("shape", [(3, 4, 2, 5, 7, 8), (2, 2, 2, 3, 0, 4)], ids=str)
def test_a_table_gives_what_its_tensors_give(shape: tuple[int, ...], padding: int) -> None:
    inputs = case(*shape, torch.float32)
    result = by_table(inputs, padding)
    assert len(result) == shape[0] + padding
    torch.testing.assert_close(result[: shape[0]], sibling_attention(*inputs))
    # Padding has no prefix, so it attends to itself.
    alone = (inputs[0][:1], inputs[1][:1], inputs[2][:1], inputs[3][:1], inputs[4][:1])
    expected = sibling_attention(*alone, torch.zeros(1, dtype=torch.int64))
    for row in result[shape[0] :]:
        torch.testing.assert_close(row[None], expected)


def test_a_table_holds_its_tensors_only_while_it_points_to_them() -> None:
    _, keys, values, *_ = case(2, 2, 2, 3, 5, 4, torch.float32)
    table = PrefixTable(1, 4, torch.float32, keys.device)
    with table.pointing_to([keys], [values]):
        assert table.keys == (keys,)
        assert table.entries[0].tolist() == [
            keys.data_ptr(),
            values.data_ptr(),
            keys.stride(0),
            keys.stride(1),
            5,
            0,
        ]
    assert table.keys == table.values == ()


def test_the_rows_of_a_table_are_aligned_alike() -> None:
    # Otherwise Triton compiles the kernel once more for every other layer.
    entries = PrefixTable(3, 8, torch.bfloat16, torch.device("cpu")).entries
    assert len({entry.data_ptr() % 16 for entry in entries}) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(2, 2, 5, 4, dtype=torch.float16), "prefix: torch.float16"),
        (torch.zeros(2, 2, 5, 8), "contiguous columns of 4 numbers"),
        (torch.zeros(2, 2, 5, 8)[..., ::2], "contiguous columns of 4 numbers"),
        (torch.zeros(2, 2, 5, 8)[..., :4], "contiguous columns of 4 numbers"),
        (torch.zeros(81)[1:].view(2, 2, 5, 4), "contiguous columns of 4 numbers"),
        (torch.zeros(2, 2, 6, 4), "values like the keys"),
    ],
    ids=["dtype", "dim", "strided", "gaps", "unaligned", "columns"],
)
def test_a_prefix_that_no_table_can_hold_is_named(wrong: torch.Tensor, message: str) -> None:
    _, _, values, *_ = case(2, 2, 2, 3, 5, 4, torch.float32)
    table = PrefixTable(1, 4, torch.float32, values.device)
    with pytest.raises(ValueError, match=message), table.pointing_to([wrong], [values]):
        raise AssertionError("the tensors are refused")


def test_a_query_that_does_not_fit_its_table_is_named() -> None:
    inputs = case(2, 4, 2, 5, 7, 8, torch.float32)
    with pytest.raises(ValueError, match="capacity: 6 is below the 7 columns"):
        by_table(inputs, padding=0, capacity=6)
    query, keys, values, *own = inputs
    table = PrefixTable(1, 8, torch.bfloat16, keys.device)
    halves = ([keys.bfloat16()], [values.bfloat16()])
    with (
        pytest.raises(ValueError, match=r"heads of 8 torch.float32 do not fit the table"),
        table.pointing_to(*halves),
    ):
        sibling_attention_at(query, table, 0, *own, 1024)
    with pytest.raises(ValueError, match="own_keys: shape"):
        by_table((query, keys, values, own[0][:, :, :2], *own[1:]), padding=0)
