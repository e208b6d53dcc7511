"""Test the estimate of how far a value steers, where the exact answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.alignment.vas_fits import (
    Pool,
    discounted_changes,
    horizon,
    prefix_rewards,
    row_of,
    slopes,
)
from infer_align.fitting.regression import Replies

POLICY = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
REWARDS = torch.tensor([2.0, -1.0, 0.5, 0.0], dtype=torch.float64)
VALUES = torch.tensor([1.0, -1.0, 0.0, 1.0], dtype=torch.float64)
PROMPTS = 10


def pool_of_single_tokens() -> Pool:
    """Make replies of one token, with each token as often as the policy draws it."""
    tokens = torch.repeat_interleave(torch.arange(4), (POLICY * 100).long()).repeat(PROMPTS)
    count = len(tokens)
    prompts = torch.arange(PROMPTS).repeat_interleave(100)
    replies = Replies(torch.ones(count, 1), tokens, torch.arange(count), REWARDS[tokens], prompts)
    candidates = torch.arange(4).repeat(count, 1)
    nothing = torch.zeros(count)
    return Pool(replies, candidates, POLICY.log().repeat(count, 1), nothing, nothing)


def test_the_estimate_is_the_slope_of_exact_steering() -> None:
    pool = pool_of_single_tokens()
    values = VALUES.repeat(len(pool.replies.tokens), 1)
    baseline = torch.full((len(values),), 0.7)
    measured = slopes(pool, values, baseline, pool.replies.prompt_index)
    beta = 1e-4
    steered = torch.softmax(POLICY.log() + beta * VALUES, dim=0)
    gain = float(((steered - POLICY) * REWARDS).sum())
    divergence = float((steered * (steered / POLICY).log()).sum())
    assert measured.gain() == pytest.approx(gain / math.sqrt(divergence), rel=1e-3)
    row = row_of("reward", 1, 1000, measured, measured)
    # Every prompt has the same replies, so no choice of prompts changes the gain.
    assert row["gain_at_1_nat_se"] == pytest.approx(0, abs=1e-12)
    assert row["difference"] == 0


def test_horizons_are_changes_of_the_reward_of_the_text_so_far() -> None:
    tokens = torch.tensor([1, 2, 3, 4, 5])
    index = torch.tensor([0, 0, 0, 1, 1])
    rewards = torch.tensor([6.0, 9.0])
    replies = Replies(torch.ones(5, 1), tokens, index, rewards, torch.tensor([0, 0]))
    before, after = prefix_rewards(replies, lambda ids: " ".join(map(str, ids)), sum_of_numbers)
    assert before.tolist() == [7.5, 1, 3, 7.5, 4]
    assert after.tolist() == [1, 3, 6, 4, 9]
    pool = Pool(replies, tokens[:, None], tokens[:, None], before, after)
    assert horizon(pool, 1).tolist() == (after - before).tolist()
    assert horizon(pool, 2).tolist() == [-4.5, 5, 3, 1.5, 5]
    whole = (rewards[index] - before).tolist()
    assert horizon(pool, 9).tolist() == whole
    assert discounted_changes(pool, 1.0).tolist() == whole
    assert discounted_changes(pool, 0.5).tolist() == [-6.5 + 1 + 0.75, 3.5, 3, -3.5 + 2.5, 5]


def sum_of_numbers(text: str) -> float:
    return float(sum(map(int, text.split())))
