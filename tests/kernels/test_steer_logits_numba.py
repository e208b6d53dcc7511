"""Test steering by heads as compiled by Numba against the definition and the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from infer_align_kernels import SteeredRows, steers_at_once
from infer_align_kernels.steer_logits import reference
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

# Numba is installed with vLLM.
pytestmark = pytest.mark.vllm
numba = pytest.importorskip("infer_align_kernels.steer_logits.numba")


def test_steering_on_a_cpu_is_compiled_where_numba_is_installed() -> None:
    assert steers_at_once(torch.device("cpu"))


# The smallest vocabulary is not much larger than the number of candidates.
@pytest.mark.parametrize(
    ("ranks", "vocabulary"), [(RANKS, 700), ((5,), 700), (RANKS, 20), (RANKS, 21), ((5,), 9000)]
)
def test_each_row_is_steered_by_its_own_weights(ranks: tuple[int, ...], vocabulary: int) -> None:
    logits = cases.logits(ROWS, vocabulary)
    heads = head_table(vocabulary, ranks)
    rows, features = steered_rows(len(ranks)), row_features(sum(ranks))
    expected = definition(logits, features, heads, rows)
    by_torch = logits.clone()
    candidates = numba.steer_logits(logits, features, heads, rows)
    np.testing.assert_allclose(logits.numpy(), expected, atol=5e-5)
    assert torch.equal(candidates, reference.steer_logits(by_torch, features, heads, rows))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("seed", range(20))
def test_numba_equals_the_reference_for_awkward_logits(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Fewer tokens than lanes, as many, and one or many more.
    vocabulary = (90, numba.LANES, numba.LANES + 1, 700)[seed % 4]
    heads, rows, features = head_table(vocabulary), steered_rows(3), row_features(sum(RANKS))
    # Few different numbers, so that many are equal.
    logits = torch.randint(-4, 5, (ROWS, vocabulary), generator=generator).float()
    awkward = torch.tensor([torch.nan, -torch.inf, -0.0, 0.0, torch.inf])
    places = torch.rand(ROWS, vocabulary, generator=generator) < seed / 20
    logits[places] = awkward[torch.randint(5, (int(places.sum()),), generator=generator)]
    logits[7] = -torch.inf
    heads.weights[1][: 4 * seed] = torch.inf
    by_torch, by_numba = logits.clone(), logits.clone()
    expected = reference.steer_logits(by_torch, features, heads, rows)
    assert torch.equal(numba.steer_logits(by_numba, features, heads, rows), expected)
    torch.testing.assert_close(by_numba, by_torch, atol=2e-5, rtol=1e-6, equal_nan=True)


def test_numba_steers_a_row_alone_as_in_its_batch() -> None:
    heads, rows, features = head_table(700), steered_rows(3), row_features(sum(RANKS))
    together = cases.logits(ROWS, 700)
    alone = together.clone()
    numba.steer_logits(together, features, heads, rows)
    for s in range(len(rows.table)):
        numba.steer_logits(alone, features[s : s + 1], heads, one_row(rows, s))
    assert torch.equal(alone.nan_to_num(), together.nan_to_num())
    none = SteeredRows(rows.table[:0], rows.k)
    assert numba.steer_logits(alone, features[:0], heads, none).shape == (0, rows.k)
