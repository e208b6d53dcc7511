"""Tests of steering without a fixed number of candidates, against the definition in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from infer_align.decoding.dense_steering import DENSE, candidate_count
from infer_align.decoding.fused_steering import FusedSteerer
from infer_align.decoding.steering import steer, value_candidates
from infer_align.decoding.steering_batch import SteeringBatch
from infer_align.methods.vas import reweight
from infer_align.steering import Steering
from infer_align.values.head import HeadValue
from tests.decoding.heads import random_heads

V = 50
D = 6
# Per row: all tokens; likely tokens; likely tokens with a masked tail; four candidates; nothing;
# all tokens by weights of 0.
BETA = np.array([[2, -1], [1.5, 0], [0, 2], [1, 1], [0, 0], [0, 0]], np.float32)
TOP_K = np.array([DENSE, DENSE, DENSE, 4, 0, DENSE])
MIN_P = np.array([0, 0.05, 0.2, 0, 0, 0], np.float32)
MASKED = np.array([True, False, True, False, False, False])
ROWS = len(TOP_K)
# Separate calls, and the call that selects, values, centres and adds.
STEERERS = pytest.mark.parametrize("steerer", [None, FusedSteerer()], ids=["separate", "fused"])


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> list[HeadValue]:
    # Two heads of different ranks.
    return random_heads(tmp_path_factory.mktemp("heads"), V, D, (3, 5), device)


@pytest.fixture
def logits(device: torch.device) -> torch.Tensor:
    made = torch.randn((ROWS, V), generator=torch.Generator().manual_seed(2)) * 3
    # A token that a bias or a grammar has banned.
    made[:, 7] = -torch.inf
    return made.to(device)


@pytest.fixture
def hidden(device: torch.device) -> torch.Tensor:
    return torch.randn((ROWS, D), generator=torch.Generator().manual_seed(3)).to(device)


def definition(
    heads: list[HeadValue], logits: torch.Tensor, hidden: torch.Tensor, row: int
) -> np.ndarray:
    """Return the steered logits of one row of the table in float64. [V], [D] -> [V]."""
    original = logits.double().cpu().numpy()
    if not BETA[row].any():
        return original
    if TOP_K[row] == DENSE:
        threshold = original.max() + np.log(MIN_P[row]) if MIN_P[row] else -np.inf
        ids = np.flatnonzero(original >= threshold)
    else:
        ids = np.argsort(-original, kind="stable")[: TOP_K[row]]
    every = torch.arange(V, device=logits.device)[None]
    values = [head.evaluate(hidden[None], every).cpu().numpy()[:, ids] for head in heads]
    tail = "mask" if MASKED[row] else "keep"
    return reweight(original[None], ids[None], np.stack(values), BETA[row], tail)[0]


def expect(
    steered: torch.Tensor,
    heads: list[HeadValue],
    logits: torch.Tensor,
    hidden: torch.Tensor,
    rows: Sequence[int] = range(ROWS),
) -> None:
    """Compare rows of the table with the definition; those without a weight stay the same."""
    for place, row in enumerate(rows):
        expected = definition(heads, logits[place], hidden[place], row)
        np.testing.assert_allclose(steered[place].cpu().numpy(), expected, atol=1e-4)
        if not BETA[row].any():
            assert torch.equal(steered[place], logits[place])


@STEERERS
@pytest.mark.parametrize("in_place", [True, False])
def test_a_mixed_batch_equals_the_definition(
    heads: list[HeadValue],
    logits: torch.Tensor,
    hidden: torch.Tensor,
    device: torch.device,
    in_place: bool,
    steerer: FusedSteerer | None,
) -> None:
    batch = SteeringBatch.build(heads, BETA, TOP_K, MASKED, device, min_p=MIN_P, steerer=steerer)
    original = logits.clone()
    # With the one call, no row has its candidates valued apart.
    assert (value_candidates(logits, hidden, batch) is None) == (steerer is not None)
    steered = steer(logits, hidden, batch, in_place=in_place)
    assert torch.equal(logits, original) != in_place
    # Every row but those with all of their tokens valued is in the one call.
    assert (batch.fused is not None) == (steerer is not None)
    assert batch.dense is not None
    assert (batch.dense.log_min_p is None) == (steerer is not None)
    expect(steered, heads, original, hidden)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_batch_of_dense_rows_alone_equals_the_definition(
    heads: list[HeadValue],
    logits: torch.Tensor,
    hidden: torch.Tensor,
    device: torch.device,
    row: int,
) -> None:
    one = slice(row, row + 1)
    batch = SteeringBatch.build(heads, BETA[one], TOP_K[one], MASKED[one], device, min_p=MIN_P[one])
    assert batch.dense is not None
    assert batch.dense.rows is None
    assert value_candidates(logits[one], hidden[one], batch) is None
    steered = steer(logits[one], hidden[one], batch)
    expected = definition(heads, logits[row], hidden[row], row)
    np.testing.assert_allclose(steered[0].cpu().numpy(), expected, atol=1e-4)


def test_rows_with_a_number_of_candidates_can_stay_out_of_the_one_call(
    heads: list[HeadValue], logits: torch.Tensor, hidden: torch.Tensor, device: torch.device
) -> None:
    batch = SteeringBatch.build(
        heads,
        BETA,
        TOP_K,
        MASKED,
        device,
        min_p=MIN_P,
        steerer=FusedSteerer(),
        fuses_candidates=False,
    )
    assert batch.fused is not None
    original = logits.clone()
    steered = steer(logits, hidden, batch)
    assert torch.equal(logits, original)
    best = original[3].argsort(descending=True)[:4]
    valued = value_candidates(logits, hidden, batch)
    assert valued is not None
    assert torch.equal(valued.ids[3], best)
    expect(steered, heads, original, hidden)


@STEERERS
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1], [1, 2], [2, 4]], ids=str)
def test_selected_rows_of_a_larger_batch(
    heads: list[HeadValue],
    logits: torch.Tensor,
    hidden: torch.Tensor,
    device: torch.device,
    rows: list[int],
    steerer: FusedSteerer | None,
) -> None:
    indices = np.array(rows)
    batch = SteeringBatch.build(
        heads,
        BETA[indices],
        TOP_K[indices],
        MASKED[indices],
        device,
        indices,
        MIN_P[indices],
        steerer,
    )
    original = logits.clone()
    steered = steer(logits, hidden, batch, in_place=True)
    expect(steered[indices], heads, original[indices], hidden[indices], rows)
    others = np.setdiff1d(np.arange(ROWS), indices)
    assert torch.equal(steered[others], original[others])


# All rows; likely tokens alone; all tokens alone; neither of them.
@STEERERS
@pytest.mark.parametrize("rows", [range(ROWS), [1, 2, 4], [0, 4, 5], [3, 4]], ids=str)
def test_a_record_made_on_the_device_gives_the_same(
    heads: list[HeadValue],
    logits: torch.Tensor,
    hidden: torch.Tensor,
    device: torch.device,
    rows: Sequence[int],
    steerer: FusedSteerer | None,
) -> None:
    indices = np.array(rows)
    beta, top_k, masked, min_p = (
        torch.from_numpy(array[indices]).to(device) for array in (BETA, TOP_K, MASKED, MIN_P)
    )
    batch = SteeringBatch.build_on_device(
        heads,
        beta,
        top_k,
        masked,
        max(0, int(TOP_K[indices].max())),
        min_p if MIN_P[indices].any() else None,
        has_all=bool(((TOP_K == DENSE) & (MIN_P == 0))[indices].any()),
        steerer=steerer,
    )
    frozen, states = logits[indices], hidden[indices]
    steered = steer(frozen, states, batch)
    expect(steered, heads, frozen, states, rows)


def test_all_tokens_equal_a_top_k_of_the_vocabulary(
    heads: list[HeadValue], logits: torch.Tensor, hidden: torch.Tensor, device: torch.device
) -> None:
    beta = np.full((ROWS, 2), 1.5, np.float32)
    masked = np.zeros(ROWS, np.bool_)
    every = SteeringBatch.build(heads, beta, np.full(ROWS, V), masked, device)
    dense = SteeringBatch.build(
        heads, beta, np.full(ROWS, DENSE), masked, device, min_p=np.zeros(ROWS, np.float32)
    )
    expected = steer(logits, hidden, every)
    steered = steer(logits, hidden, dense)
    torch.testing.assert_close(steered, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("steering", "count"),
    [
        (Steering({}, 20, "keep"), 20),
        (Steering({}, 200, "keep"), 50),
        (Steering({}, "all", "keep"), DENSE),
        (Steering({}, 20, "keep", 0.1), DENSE),
    ],
)
def test_the_number_of_candidates(steering: Steering, count: int) -> None:
    assert candidate_count(steering, V) == count
