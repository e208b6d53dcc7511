"""Tests of guidance, candidate by candidate against the definition of `methods.guidance`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infer_align.decoding.guidance import (
    CandidateGuidance,
    ContextPair,
    GuidanceBatch,
    guide_rows,
)
from infer_align.methods.guidance import guide

V = 40
# 1 + 3 + 1 + 2 rows of a forward pass: two plain candidates and two that are guided.
FIRST_ROWS = {0: 0, 1: 1, 2: 4, 3: 5}
TWO_TRAITS = CandidateGuidance((ContextPair(2.0, 1, 0), ContextPair(-0.5, 2, 1)), 3, 0.05)
ONE_TRAIT = CandidateGuidance((ContextPair(3.0, 1, 0),), 2, 0.0)
GUIDED = {1: TWO_TRAITS, 3: ONE_TRAIT}


def random_logits(rows: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn((rows, V), generator=torch.Generator().manual_seed(seed))


def definition(
    logits: torch.Tensor, contexts: torch.Tensor, guidance: CandidateGuidance
) -> np.ndarray:
    """Return the guided logits of one candidate in float64: [V], [contexts, V] -> [V]."""
    logprobs = torch.log_softmax(contexts.double().cpu(), dim=-1).numpy()
    pairs = np.array(
        [[logprobs[pair.positive], logprobs[pair.negative]] for pair in guidance.pairs]
    )
    scales = [pair.scale for pair in guidance.pairs]
    return guide(logits.double().cpu().numpy(), pairs, scales, guidance.min_p)


def check(logits: torch.Tensor, contexts: torch.Tensor, guided: torch.Tensor) -> None:
    for i, guidance in GUIDED.items():
        rows = slice(FIRST_ROWS[i], FIRST_ROWS[i] + guidance.contexts)
        expected = definition(logits[i], contexts[rows], guidance)
        actual = guided[i].double().cpu().numpy()
        np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
        possible = ~np.isneginf(expected)
        np.testing.assert_allclose(actual[possible], expected[possible], rtol=1e-5, atol=1e-4)


@pytest.fixture
def batch(device: torch.device) -> GuidanceBatch:
    return GuidanceBatch.build(GUIDED, FIRST_ROWS, device)


def test_each_candidate_equals_the_definition(batch: GuidanceBatch, device: torch.device) -> None:
    logits, contexts = random_logits(4, 1).to(device), random_logits(7, 2).to(device)
    check(logits, contexts, guide_rows(logits, contexts, batch))


def test_plain_candidates_stay_bit_for_bit_the_same(
    batch: GuidanceBatch, device: torch.device
) -> None:
    logits, contexts = random_logits(4, 3).to(device), random_logits(7, 4).to(device)
    original = logits.clone()
    # What a plain candidate's row of the forward pass holds is not read.
    contexts[[0, 4]] = torch.nan
    guided = guide_rows(logits, contexts, batch)
    assert torch.equal(guided[[0, 2]], original[[0, 2]])
    assert torch.equal(logits, original)
    assert not torch.equal(guided[[1, 3]], original[[1, 3]])


def test_a_candidate_does_not_depend_on_its_neighbours(
    batch: GuidanceBatch, device: torch.device
) -> None:
    logits, contexts = random_logits(4, 5).to(device), random_logits(7, 6).to(device)
    together = guide_rows(logits, contexts, batch)
    alone = GuidanceBatch.build({0: TWO_TRAITS}, {0: 0}, device)
    assert torch.equal(guide_rows(logits[1:2], contexts[1:4], alone)[0], together[1])


@given(
    forbidden=st.lists(st.integers(0, V - 1), max_size=V - 1),
    impossible=st.lists(st.integers(0, V - 1), max_size=V - 1),
    scale=st.floats(-20, 20),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_forbidden_tokens_stay_forbidden_and_one_token_stays_allowed(
    forbidden: list[int], impossible: list[int], scale: float, min_p: float, seed: int
) -> None:
    guidance = CandidateGuidance((ContextPair(scale, 1, 0),), 2, min_p)
    logits, contexts = random_logits(1, seed), random_logits(2, seed + 1)
    logits[0, forbidden] = -torch.inf
    contexts[1, impossible] = -torch.inf
    guided = guide_rows(
        logits, contexts, GuidanceBatch.build({0: guidance}, {0: 0}, logits.device)
    )[0]
    assert torch.isneginf(guided[forbidden]).all()
    assert not guided.isnan().any()
    assert guided.isfinite().any()
    if scale:
        expected = definition(logits[0], contexts, guidance)
        np.testing.assert_allclose(guided.numpy(), expected, rtol=1e-4, atol=1e-3)


def test_contexts_that_are_the_same_change_nothing_but_the_mask() -> None:
    same = CandidateGuidance((ContextPair(5.0, 0, 0),), 1, 0.3)
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    guided = guide_rows(logits, logits, GuidanceBatch.build({0: same}, {0: 0}, logits.device))
    assert torch.equal(guided[0, :3], logits[0, :3])
    assert guided[0, 3] == -torch.inf
