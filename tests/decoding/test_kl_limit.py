"""Tests of the limit on the divergence of a step, against the definition in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from infer_align.decoding.dense_steering import DENSE
from infer_align.decoding.kl_limit import limit_kl
from infer_align.decoding.steering import steer
from infer_align.decoding.steering_batch import SteeringBatch
from infer_align.values.head import HeadValue
from tests.decoding.heads import random_heads

V = 50
D = 6
# Four candidates; all tokens; likely tokens; four candidates without a limit; not steered.
TOP_K = np.array([4, DENSE, DENSE, 4, 0])
MIN_P = np.array([0, 0, 0.05, 0, 0], np.float32)
BETA = np.array([[6.0], [4.0], [6.0], [6.0], [0.0]], np.float32)
MAX_KL = np.array([0.1, 0.02, 0.3, np.inf, np.inf], np.float32)
MASKED = np.zeros(5, np.bool_)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> HeadValue:
    return random_heads(tmp_path_factory.mktemp("heads"), V, D, (3,), device)[0]


@pytest.fixture
def logits(device: torch.device) -> torch.Tensor:
    made = torch.randn((5, V), generator=torch.Generator().manual_seed(2)) * 3
    # A token that a bias or a grammar has banned.
    made[:, 7] = -torch.inf
    return made.to(device)


@pytest.fixture
def hidden(device: torch.device) -> torch.Tensor:
    return torch.randn((5, D), generator=torch.Generator().manual_seed(3)).to(device)


def divergence(steered: Any, frozen: Any) -> float:
    """Return KL(steered || frozen) of two rows of logits, in nats."""
    q = log_softmax(np.asarray(steered, np.float64))
    p = log_softmax(np.asarray(frozen, np.float64))
    is_possible = q > -np.inf
    return float(np.sum(np.exp(q[is_possible]) * (q[is_possible] - p[is_possible])))


def expect_limits(steered: torch.Tensor, free: torch.Tensor, logits: torch.Tensor) -> None:
    """Assert that each row is within its limit, and reaches it if steering is over it."""
    frozen = logits.cpu().numpy()
    for row, limit in enumerate(MAX_KL):
        kl = divergence(steered[row].cpu().numpy(), frozen[row])
        assert kl <= limit + 1e-4
        if divergence(free[row].cpu().numpy(), frozen[row]) > limit:
            assert kl == pytest.approx(limit, rel=1e-2)
        else:
            assert torch.equal(steered[row], free[row])


@pytest.mark.parametrize("in_place", [True, False])
def test_each_row_keeps_its_own_limit(
    head: HeadValue, logits: torch.Tensor, hidden: torch.Tensor, in_place: bool
) -> None:
    device = logits.device
    free = SteeringBatch.build([head], BETA, TOP_K, MASKED, device, min_p=MIN_P)
    without = steer(logits, hidden, free)
    assert sum(divergence(without[row].cpu(), logits[row].cpu()) > MAX_KL[row] for row in range(5))
    batch = SteeringBatch.build([head], BETA, TOP_K, MASKED, device, min_p=MIN_P, max_kl=MAX_KL)
    original = logits.clone()
    steered = steer(logits, hidden, batch, in_place=in_place)
    assert torch.equal(logits, original) != in_place
    expect_limits(steered, without, original)


def test_rows_of_a_larger_batch_and_a_record_made_on_the_device(
    head: HeadValue, logits: torch.Tensor, hidden: torch.Tensor
) -> None:
    device = logits.device
    rows = np.array([0, 1, 2, 3])
    some = slice(0, 4)
    batch = SteeringBatch.build(
        [head],
        BETA[some],
        TOP_K[some],
        MASKED[some],
        device,
        rows=rows,
        min_p=MIN_P[some],
        max_kl=MAX_KL[some],
    )
    steered = steer(logits, hidden, batch)
    assert torch.equal(steered[4], logits[4])
    beta, top_k, min_p, max_kl = (
        torch.from_numpy(array).to(device) for array in (BETA, TOP_K, MIN_P, MAX_KL)
    )
    on_device = SteeringBatch.build_on_device(
        [head], beta, top_k, None, 4, min_p=min_p, max_kl=max_kl
    )
    again = steer(logits, hidden, on_device)
    torch.testing.assert_close(again, steered, atol=1e-3, rtol=1e-3)
    assert torch.equal(again[3:], steered[3:])


def test_a_batch_without_limits_has_no_record(head: HeadValue, device: torch.device) -> None:
    none = np.full(5, np.inf, np.float32)
    batch = SteeringBatch.build([head], BETA, TOP_K, MASKED, device, min_p=MIN_P, max_kl=none)
    assert batch.kl_limit is None


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=3, max_size=12),
    st.floats(-30, 30, width=32),
    st.floats(1e-3, 5),
    st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=80)
def test_the_limit_always_holds_and_no_token_is_moved_the_other_way(
    row: list[float], beta: float, limit: float, seed: int
) -> None:
    frozen = torch.tensor([row])
    values = torch.randn(frozen.shape, generator=torch.Generator().manual_seed(seed))
    steered = frozen + beta * values
    limited = limit_kl(frozen, steered, torch.tensor([limit]))
    free = divergence(steered[0].numpy(), frozen[0].numpy())
    kl = divergence(limited[0].numpy(), frozen[0].numpy())
    assert kl <= limit + 1e-3
    assert kl <= free + 1e-3
    # The limited step is a smaller beta.
    shift = (limited - frozen)[0]
    assert torch.all(shift * (beta * values)[0] >= -1e-4)


def test_a_token_that_steering_removes_stays_removed(device: torch.device) -> None:
    frozen = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [-torch.inf, 0.0, 0.0]])
    steered = torch.tensor([[0.5, -torch.inf, 9.0], [0.1, -torch.inf, 2.0], [-torch.inf] * 3])
    limits = torch.tensor([0.05, 0.1, 0.1])
    limited = limit_kl(frozen.to(device), steered.to(device), limits.to(device)).cpu()
    assert not limited.isnan().any()
    assert limited[0, 1] == -torch.inf
    # The divergence of the other tokens is at its limit.
    remaining = divergence(limited[0, [0, 2]], frozen[0, [0, 2]])
    assert remaining == pytest.approx(0.05, abs=1e-4)
    # This row is within its limit, and stays as it is.
    assert limited[1].equal(steered[1])
    # No token is left in the last row.
    assert (limited[2] == -torch.inf).all()
