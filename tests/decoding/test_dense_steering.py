"""Tests of steering without a fixed number of candidates, against the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from infer_align.decoding.dense_steering import DENSE, candidate_count
from infer_align.decoding.steering import SteeringBatch, steer
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
    """Return the steered logits of one row in float64. [V]."""
    original = logits[row].double().cpu().numpy()
    if not BETA[row].any():
        return original
    if TOP_K[row] == DENSE:
        threshold = original.max() + np.log(MIN_P[row]) if MIN_P[row] else -np.inf
        ids = np.flatnonzero(original >= threshold)
    else:
        ids = np.argsort(-original, kind="stable")[: TOP_K[row]]
    every = torch.arange(V, device=logits.device)[None]
    values = [head.evaluate(hidden[row : row + 1], every).cpu().numpy()[:, ids] for head in heads]
    tail = "mask" if MASKED[row] else "keep"
    return reweight(original[None], ids[None], np.stack(values), BETA[row], tail)[0]


def expect(
    steered: torch.Tensor, heads: list[HeadValue], logits: torch.Tensor, hidden: torch.Tensor
) -> None:
    for row in range(ROWS):
        expected = definition(heads, logits, hidden, row)
        np.testing.assert_allclose(steered[row].cpu().numpy(), expected, atol=1e-4)
    for row in np.flatnonzero(~BETA.any(axis=1)):
        assert torch.equal(steered[row], logits[row])


@pytest.mark.parametrize("in_place", [True, False])
def test_a_mixed_batch_equals_the_definition(
    heads: list[HeadValue],
    logits: torch.Tensor,
    hidden: torch.Tensor,
    device: torch.device,
    in_place: bool,
) -> None:
    batch = SteeringBatch.build(heads, BETA, TOP_K, MASKED, device, min_p=MIN_P)
    original = logits.clone()
    steered, candidates = steer(logits, hidden, batch, in_place=in_place)
    assert torch.equal(logits, original) != in_place
    assert candidates.shape == (ROWS, 4)
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
    steered, candidates = steer(logits[one], hidden[one], batch)
    assert candidates.shape == (1, 0)
    expected = definition(heads, logits, hidden, row)
    np.testing.assert_allclose(steered[0].cpu().numpy(), expected, atol=1e-4)


def test_selected_rows_of_a_larger_batch(
    heads: list[HeadValue], logits: torch.Tensor, hidden: torch.Tensor, device: torch.device
) -> None:
    rows = np.array([0, 1, 2, 3])
    batch = SteeringBatch.build(
        heads, BETA[rows], TOP_K[rows], MASKED[rows], device, rows, MIN_P[rows]
    )
    original = logits.clone()
    steered, _ = steer(logits, hidden, batch, in_place=True)
    expect(steered, heads, original, hidden)


def test_a_record_made_on_the_device_gives_the_same(
    heads: list[HeadValue], logits: torch.Tensor, hidden: torch.Tensor, device: torch.device
) -> None:
    beta, top_k, masked, min_p = (
        torch.from_numpy(array).to(device) for array in (BETA, TOP_K, MASKED, MIN_P)
    )
    batch = SteeringBatch.build_on_device(heads, beta, top_k, masked, 4, min_p)
    steered, _ = steer(logits, hidden, batch)
    expect(steered, heads, logits, hidden)


def test_all_tokens_equal_a_top_k_of_the_vocabulary(
    heads: list[HeadValue], logits: torch.Tensor, hidden: torch.Tensor, device: torch.device
) -> None:
    beta = np.full((ROWS, 2), 1.5, np.float32)
    masked = np.zeros(ROWS, np.bool_)
    every = SteeringBatch.build(heads, beta, np.full(ROWS, V), masked, device)
    dense = SteeringBatch.build(
        heads, beta, np.full(ROWS, DENSE), masked, device, min_p=np.zeros(ROWS, np.float32)
    )
    expected, _ = steer(logits, hidden, every)
    steered, _ = steer(logits, hidden, dense)
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
