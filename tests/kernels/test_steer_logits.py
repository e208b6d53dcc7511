"""Test steering by heads on CPU against the definition in float64."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from infer_align_kernels import HeadTable, SteeredRows, Workspace, steer_logits
from tests.kernels import cases

RANKS = (3, 40, 16)
LIKELY = SteeredRows.LIKELY
# Row of the logits, candidates, and a masked tail.
RECORDS = [
    [6, 20, 0],
    [1, 9, 1],
    [3, 13, 1],
    [2, 7, 0],
    [0, 0, 1],
    [5, 1, 0],
    [8, LIKELY, 0],
    [10, LIKELY, 1],
    [9, LIKELY, 0],
    [7, LIKELY, 1],
]
# For the rows that are LIKELY: few tokens, nearly all tokens, no weight, and the likeliest token.
MIN_P = [0, 0, 0, 0, 0, 0, 0.2, 1e-9, 0.5, 1]
ROWS = 11


def head_table(vocabulary: int, ranks: tuple[int, ...] = RANKS) -> HeadTable:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(vocabulary, rank, generator=generator) for rank in ranks]
    biases = [torch.randn(vocabulary, generator=generator) for _ in ranks]
    return HeadTable(weights, biases)


def steered_rows(heads: int, k: int = 20) -> SteeredRows:
    """Make rows of both kinds of tail; the second is not steered, the third by some heads."""
    beta = torch.randn(len(RECORDS), heads, generator=torch.Generator().manual_seed(2))
    beta[[1, 8]] = 0
    beta[2, 0] = 0
    records = torch.tensor(RECORDS, dtype=torch.int32)
    numbers = torch.cat([torch.tensor(MIN_P).log()[:, None], beta], dim=1)
    table = torch.cat([records, numbers.view(torch.int32)], dim=1)
    return SteeredRows(table, k, has_likely=True)


def one_row(rows: SteeredRows, s: int) -> SteeredRows:
    """Return the steering of one row alone."""
    return SteeredRows(rows.table[s : s + 1], rows.k, has_likely=rows.has_likely)


def row_features(count: int) -> torch.Tensor:
    return torch.randn(len(RECORDS), count, generator=torch.Generator().manual_seed(3))


def definition(
    logits: torch.Tensor, features: torch.Tensor, heads: HeadTable, rows: SteeredRows
) -> np.ndarray:
    """Steer the rows one after the other in float64."""
    steered = logits.double().numpy().copy()
    beta = rows.beta.double().numpy()
    for s, (row, count, masked) in enumerate(RECORDS):
        if not count or not beta[s].any():
            continue
        clean = np.where(np.isnan(steered[row]), -np.inf, steered[row])
        if count == LIKELY:
            ids = np.flatnonzero(clean >= clean.max() + np.log(MIN_P[s]))
        else:
            ids = np.argsort(-clean, kind="stable")[:count]
        shift = np.zeros(len(ids))
        place = 0
        for m, (weight, bias) in enumerate(zip(heads.weights, heads.biases, strict=True)):
            u = features[s, place : place + weight.shape[1]].double().numpy()
            place += weight.shape[1]
            if beta[s, m]:
                q = weight.double().numpy()[ids] @ u + bias.double().numpy()[ids]
                shift += beta[s, m] * (q - q.mean())
        if masked:
            steered[row] = -np.inf
        steered[row, ids] = clean[ids] + shift
    return steered


@pytest.mark.parametrize(("ranks", "vocabulary"), [(RANKS, 700), ((5,), 700), (RANKS, 21)])
def test_each_row_is_steered_by_its_own_weights(ranks: tuple[int, ...], vocabulary: int) -> None:
    logits = cases.logits(ROWS, vocabulary)
    heads, rows, features = (
        head_table(vocabulary, ranks),
        steered_rows(len(ranks)),
        row_features(sum(ranks)),
    )
    expected = definition(logits, features, heads, rows)
    original = logits.clone()
    candidates = steer_logits(logits, features, heads, rows, Workspace())
    np.testing.assert_allclose(logits.numpy(), expected, atol=2e-5)
    assert candidates.shape == (len(RECORDS), 20)
    assert (candidates[2, 13:] == -1).all()
    assert (candidates[6:] == -1).all()
    for untouched in (0, 1, 4, 9):
        assert torch.equal(logits[untouched].nan_to_num(), original[untouched].nan_to_num())


def test_a_head_of_weight_zero_is_ignored() -> None:
    heads, rows, features = head_table(700), steered_rows(3), row_features(sum(RANKS))
    logits = cases.logits(ROWS, 700)
    expected = logits.clone()
    steer_logits(expected, features, heads, rows, Workspace())
    # The features of the first head, which does not steer the third row.
    features[2, :3] = torch.nan
    steer_logits(logits, features, heads, rows, Workspace())
    assert torch.equal(logits[3], expected[3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(7, 700, dtype=torch.float16)}, "logits: .* torch.float16"),
        ({"logits": torch.zeros(7, 701)}, "heads: 700 tokens"),
        ({"features": torch.zeros(10, 58)}, "features: \\(10, 58\\)"),
        ({"rows": steered_rows(2)}, "rows: 6 columns"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.zeros(ROWS, 700),
        "features": torch.zeros(10, 59),
        "heads": head_table(700),
        "rows": steered_rows(3),
        "workspace": Workspace(),
    }
    with pytest.raises(ValueError, match=message):
        steer_logits(**(arguments | change))


@pytest.mark.parametrize("k", [-1, 129])
def test_too_many_candidates_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k: {k}"):
        steered_rows(1, k)


def test_a_head_of_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be torch\.float32"):
        HeadTable([torch.zeros(4, 2, dtype=torch.float16)], [torch.zeros(4)])
    with pytest.raises(ValueError, match=r"must be \[4, r\]"):
        HeadTable([torch.zeros(4, 2)], [torch.zeros(5)])


def test_a_workspace_keeps_the_memory_of_earlier_calls_and_at_most_doubles() -> None:
    workspace = Workspace()
    cpu = torch.device("cpu")
    # A graph of this call would write to its memory for ever.
    first = workspace.take(2, 3, cpu)._base
    kept = weakref.ref(first)
    address = first.data_ptr()
    del first
    assert workspace.take(1, 5, cpu).data_ptr() == address
    sizes = []
    for rows in range(1, 200):
        sizes.append(workspace.take(rows, 7, cpu)._base.numel())
    gc.collect()
    assert kept() is not None
    assert sum(set(sizes)) <= 4 * 199 * 7
