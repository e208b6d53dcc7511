"""Test the Triton code of steering by heads, interpreted, against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from infer_align_kernels import SteeredRows, Workspace
from infer_align_kernels.steer_logits import reference, triton
from tests.kernels import cases
from tests.kernels.test_steer_logits import (
    RANKS,
    ROWS,
    definition,
    head_table,
    one_row,
    row_features,
    steered_rows,
)


# The larger vocabulary has three groups of tiles.
@pytest.mark.parametrize(("ranks", "vocabulary"), [(RANKS, 700), ((5,), 700), ((5,), 9000)])
def test_each_row_is_steered_by_its_own_weights(ranks: tuple[int, ...], vocabulary: int) -> None:
    logits = cases.logits(ROWS, vocabulary)
    heads, rows, features = (
        head_table(vocabulary, ranks),
        steered_rows(len(ranks)),
        row_features(sum(ranks)),
    )
    expected = definition(logits, features, heads, rows)
    by_torch = logits.clone()
    original = logits.clone()
    workspace = Workspace()
    candidates = triton.steer_logits(logits, features, heads, rows, workspace)
    np.testing.assert_allclose(logits.numpy(), expected, atol=2e-5)
    assert torch.equal(candidates, reference.steer_logits(by_torch, features, heads, rows))
    # The workspace is used again, and its content does not matter.
    again = original.clone()
    triton.steer_logits(again, features, heads, rows, workspace)
    assert torch.equal(again.nan_to_num(), logits.nan_to_num())


def test_a_row_does_not_depend_on_its_batch() -> None:
    heads, rows, features = head_table(700), steered_rows(3), row_features(sum(RANKS))
    together = cases.logits(ROWS, 700)
    alone = together.clone()
    triton.steer_logits(together, features, heads, rows, Workspace())
    for s in range(len(rows.table)):
        triton.steer_logits(alone, features[s : s + 1], heads, one_row(rows, s), Workspace())
    assert torch.equal(alone.nan_to_num(), together.nan_to_num())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_candidate_without_a_finite_value_is_dropped_and_does_not_count() -> None:
    heads = head_table(700)
    heads.biases[1][:350] = torch.nan
    rows, features = steered_rows(3), row_features(sum(RANKS))
    logits = cases.logits(ROWS, 700)
    by_torch = logits.clone()
    triton.steer_logits(logits, features, heads, rows, Workspace())
    reference.steer_logits(by_torch, features, heads, rows)
    torch.testing.assert_close(logits, by_torch, atol=2e-5, rtol=1e-6, equal_nan=True)


def test_an_empty_batch_gives_no_candidates() -> None:
    rows = SteeredRows(steered_rows(3).table[:0], 20)
    features = torch.zeros(0, sum(RANKS))
    logits = cases.logits(ROWS, 700)
    candidates = triton.steer_logits(logits, features, head_table(700), rows, Workspace())
    assert candidates.shape == (0, 20)
