"""Sibling attention on CPU: the torch reference against one softmax per sibling in float64."""

from __future__ import annotations

import pytest
import torch

from infer_align_kernels import sibling_attention
from tests.kernels import float64

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def case(
    rows: int, heads: int, kv_heads: int, siblings: int, columns: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Views as an engine has them: heads transposed, the prefix inside a longer buffer."""
    g = torch.Generator().manual_seed(0)
    query = torch.randn(rows, siblings, heads, dim, generator=g).to(dtype).transpose(1, 2)
    keys, values = torch.randn(2, rows, kv_heads, columns + 9, dim, generator=g).to(dtype)[
        :, :, :, :columns
    ]
    own_keys, own_values = (
        torch.randn(2, rows, siblings, kv_heads, dim, generator=g).to(dtype).transpose(2, 3)
    )
    lengths = torch.randint(0, columns + 1, (rows,), generator=g)
    lengths[:1] = 0
    lengths[-1:] = columns
    return query, keys, values, own_keys, own_values, lengths


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
def test_each_sibling_sees_its_prefix_and_itself(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    given = case(*shape, dtype)
    got = sibling_attention(*given)
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.double(), float64.attention(*given), atol=TOLERANCE[dtype], rtol=0
    )


def test_a_row_does_not_depend_on_its_batch_nor_on_its_padding() -> None:
    given = case(5, 4, 2, 6, 40, 16, torch.float32)
    together = sibling_attention(*given)
    for b in range(5):
        alone = sibling_attention(*(t[b : b + 1] for t in given))
        torch.testing.assert_close(alone, together[b : b + 1], atol=1e-6, rtol=1e-6)
    query, keys, values, own_keys, own_values, lengths = given
    wider = [torch.cat([torch.full_like(t[:, :, :7], 1e4), t], dim=2) for t in (keys, values)]
    torch.testing.assert_close(
        sibling_attention(query, *wider, own_keys, own_values, lengths),
        together,
        atol=1e-6,
        rtol=1e-6,
    )


def test_the_scale_is_the_callers() -> None:
    given = case(2, 2, 2, 3, 5, 4, torch.float32)
    doubled = sibling_attention(given[0] * 2, *given[1:])
    torch.testing.assert_close(sibling_attention(*given, scale=2 * 4**-0.5), doubled)


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
def test_what_does_not_fit_is_named(index: int, wrong: torch.Tensor, message: str) -> None:
    given = list(case(2, 4, 2, 5, 7, 8, torch.float32))
    given[index] = wrong
    with pytest.raises(ValueError, match=message):
        sibling_attention(*given)
