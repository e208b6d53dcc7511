"""The Triton code of sibling attention, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch

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
    ],
    ids=str,
)
def test_each_sibling_sees_its_prefix_and_itself(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    given = case(*shape, dtype)
    # Columns before a row's prefix are never read.
    for row, length in enumerate(given[5].tolist()):
        for tensor in given[1:3]:
            tensor[row, :, : tensor.shape[2] - length] = torch.nan
    got = triton.sibling_attention(*given, scale=shape[-1] ** -0.5)
    torch.testing.assert_close(
        got.double(), float64.attention(*given), atol=TOLERANCE[dtype], rtol=0
    )


def test_a_row_does_not_depend_on_its_batch() -> None:
    given = case(5, 4, 2, 6, 40, 16, torch.float32)
    together = triton.sibling_attention(*given, scale=0.25)
    for b in (0, 2, 4):
        alone = triton.sibling_attention(*(t[b : b + 1] for t in given), scale=0.25)
        assert torch.equal(alone, together[b : b + 1])


def test_nothing_to_do() -> None:
    assert triton.sibling_attention(*case(0, 2, 2, 3, 4, 4, torch.float32), scale=1.0).shape == (
        0,
        2,
        3,
        4,
    )
    assert triton.sibling_attention(*case(2, 2, 1, 0, 4, 4, torch.float32), scale=1.0).shape == (
        2,
        2,
        0,
        4,
    )


def test_scattered_numbers_are_refused() -> None:
    given = list(case(2, 4, 2, 5, 7, 8, torch.float32))
    given[1] = given[1].transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match="contiguous"):
        triton.sibling_attention(*given, scale=1.0)
