"""Tests of steering, row by row against the float64 definition of `infer_align.methods.vas`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from infer_align.decoding.device import upload
from infer_align.decoding.estimates import expected_values
from infer_align.decoding.steering import steer, value_candidates
from infer_align.decoding.steering_batch import SteeringBatch
from infer_align.methods.vas import reweight
from infer_align.values.head import HeadValue, read
from tests.decoding.heads import random_heads

V = 40
D = 6
ROWS = 4
# One row per kind of steering: one value, two values, a masked tail, and no steering.
BETA = np.array([[2.0, 0.0], [1.0, -3.0], [0.0, 1.5], [0.0, 0.0]], np.float32)
TOP_K = np.array([5, 9, 2, 0])
MASKED = np.array([False, False, True, False])


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> list[HeadValue]:
    return random_heads(tmp_path_factory.mktemp("heads"), V, D, (3, 3), device)


@pytest.fixture
def logits(device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return (torch.randn((ROWS, V), generator=generator) * 3).to(device)


@pytest.fixture
def hidden(device: torch.device) -> torch.Tensor:
    return torch.randn((ROWS, D), generator=torch.Generator().manual_seed(3)).to(device)


def definition(
    heads: list[HeadValue], logits: torch.Tensor, hidden: torch.Tensor, row: int
) -> np.ndarray:
    """Return the steered logits of one row in float64. [V]."""
    original = logits[row].double().cpu().numpy()
    if not TOP_K[row]:
        return original
    ids = np.argsort(-original, kind="stable")[None, : TOP_K[row]]
    every = torch.arange(V, device=logits.device)[None]
    values = [
        head.evaluate(hidden[row : row + 1], every).cpu().numpy()[:, ids[0]] for head in heads
    ]
    tail = "mask" if MASKED[row] else "keep"
    return reweight(original[None], ids, np.stack(values), BETA[row], tail)[0]


def expect(
    steered: torch.Tensor, heads: list[HeadValue], logits: torch.Tensor, hidden: torch.Tensor
) -> None:
    for row in range(ROWS):
        expected = definition(heads, logits, hidden, row)
        np.testing.assert_allclose(steered[row].cpu().numpy(), expected, atol=1e-4)
    assert torch.equal(steered[3], logits[3]), "a row without weights stays bit for bit the same"


def test_each_row_is_steered_by_its_own_values(
    heads: list[HeadValue], logits: torch.Tensor, hidden: torch.Tensor, device: torch.device
) -> None:
    batch = SteeringBatch.build(heads, BETA, TOP_K, MASKED, device)
    original = logits.clone()
    steered = steer(logits, hidden, batch)
    assert torch.equal(logits, original), "without `in_place`, the logits stay unchanged"
    valued = value_candidates(logits, hidden, batch)
    assert valued is not None
    assert valued.ids.shape == (ROWS, 9)
    expect(steered, heads, original, hidden)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_selection_of_rows_gives_the_same(
    heads: list[HeadValue],
    logits: torch.Tensor,
    hidden: torch.Tensor,
    device: torch.device,
    in_place: bool,
) -> None:
    rows = np.array([0, 1, 2])
    batch = SteeringBatch.build(heads, BETA[rows], TOP_K[rows], MASKED[rows], device, rows)
    original = logits.clone()
    valued = value_candidates(logits, hidden, batch)
    assert valued is not None
    assert valued.ids.shape == (3, 9)
    steered = steer(logits, hidden, batch, in_place=in_place)
    assert (steered.data_ptr() == logits.data_ptr()) == in_place
    expect(steered, heads, original, hidden)


def test_without_values_nothing_changes(
    logits: torch.Tensor, hidden: torch.Tensor, device: torch.device
) -> None:
    no_values = np.zeros((ROWS, 0), np.float32)
    batch = SteeringBatch.build([], no_values, TOP_K, MASKED, device)
    steered = steer(logits, hidden, batch)
    assert torch.equal(steered, logits)


def test_expected_values_are_the_mean_over_the_policy(
    heads: list[HeadValue], logits: torch.Tensor, hidden: torch.Tensor
) -> None:
    weights = [{heads[0]: 0.5}, {heads[0]: 1.0, heads[1]: -2.0}, {}, {heads[1]: 3.0}]
    values = expected_values(logits, hidden, weights)
    policy = torch.softmax(logits, dim=-1)
    means = {head: (policy * _fitted_values(head, hidden)).sum(dim=-1) for head in heads}
    for row, of_row in enumerate(weights):
        expected = sum(weight * float(means[head][row]) for head, weight in of_row.items())
        assert float(values[row]) == pytest.approx(expected, abs=1e-4)


def _fitted_values(head: HeadValue, hidden: torch.Tensor) -> torch.Tensor:
    """Compute the values of all tokens from the file of a linear head. [B, d] -> [B, V]."""
    tensors = {name: tensor.to(hidden.device) for name, tensor in read(head.path)[0].items()}
    return hidden @ tensors["P"].T @ tensors["E"].T + tensors["b"]


def test_an_uploaded_array_may_change_afterwards(device: torch.device) -> None:
    array = np.arange(5)
    tensor = upload(array, device)
    array[:] = 0
    assert tensor.tolist() == [0, 1, 2, 3, 4]
