"""Test the curve of reward against KL over beta, and the suggested beta."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infer_align.config.fitting import FitConfig
from infer_align.fitting.curve import (
    BetaSample,
    Steered,
    clustered_mean,
    make_points,
    suggest_beta,
)
from infer_align.fitting.samples import draw_candidates
from infer_align.fitting.samples_file import SamplingConfig
from infer_align.types import Draw
from infer_align.values import head
from infer_align.values.head import HeadValue

SAMPLING = SamplingConfig("tiny", "length", "mean", replies_per_prompt=8, max_tokens=6, seed=5)
CONFIG = FitConfig(curve_replies=30)
GROUPS = np.arange(40) % 10


def sample(beta: float, gain: float, kl: float, noise: float = 0.1) -> BetaSample:
    """Return 40 replies to 10 prompts whose rewards are `gain` above those with beta 0."""
    prompts = np.random.default_rng(7).normal(size=10)[GROUPS]
    differences = noise * np.random.default_rng(int(100 * beta)).normal(size=40)
    rewards = prompts + (gain + differences if beta else 0.0)
    return BetaSample(beta, rewards, np.full(40, kl))


# --- statistics ---


def test_errors_are_clustered_by_prompt() -> None:
    values = np.repeat([1.0, 2.0, 4.0, 7.0], 25)
    groups = np.repeat([3, 0, 1, 2], 25)
    mean, error = clustered_mean(values, groups)
    assert mean == 3.5
    # Replies to one prompt that are all equal tell as much as one of them.
    assert error == pytest.approx(np.std([1, 2, 4, 7], ddof=1) / 2)
    shuffled = np.random.default_rng(0).permutation(100)
    assert clustered_mean(values[shuffled], groups[shuffled]) == pytest.approx((mean, error))


def test_groups_of_one_give_the_usual_error() -> None:
    values = np.array([1.0, 5.0, math.nan, 3.0])
    mean, error = clustered_mean(values, np.arange(4))
    assert (mean, error) == pytest.approx((3.0, 2.0 / math.sqrt(3)))


def test_a_mean_without_values_or_a_second_group_has_no_error() -> None:
    assert all(math.isnan(x) for x in clustered_mean(np.full(3, math.nan), np.arange(3)))
    mean, error = clustered_mean(np.array([2.0, 4.0]), np.array([1, 1]))
    assert mean == 3.0
    assert math.isnan(error)


def test_gains_are_paired_so_that_differences_of_prompts_cancel() -> None:
    frozen, steered = make_points([sample(0, 0, 0), sample(2, 0.3, 1.5)], GROUPS)
    assert steered.gain == pytest.approx(0.3, abs=0.05)
    assert steered.gain_se < 0.03 < steered.reward_se
    assert (frozen.gain, frozen.gain_se) == (0.0, 0.0)


def test_unscored_replies_are_counted_and_leave_their_pair() -> None:
    steered = sample(1, 0.5, 1)
    steered.rewards[:3] = math.nan
    _, point = make_points([sample(0, 0, 0), steered], GROUPS)
    assert point.unscored == 3
    assert point.gain == pytest.approx(0.5, abs=0.06)


# --- the suggestion ---


@pytest.mark.parametrize(
    ("gains", "beta"),
    [
        ((0.5, 1.0, 2.0), 4.0),
        ((0.5, 1.995, 2.0), 2.0),
        ((2.0, 1.9, 1.5), 1.0),
        ((-1.0, -0.5, -0.2), 0.0),
        ((0.01, 0.02, 0.03), 0.0),
    ],
)
def test_the_smallest_beta_that_is_as_good_as_the_best_is_suggested(
    gains: Any, beta: float
) -> None:
    samples = [sample(0, 0, 0)]
    for weight, gain in zip((1.0, 2.0, 4.0), gains, strict=True):
        samples.append(sample(weight, gain, weight, noise=0.2))
    assert suggest_beta(samples, GROUPS, 10) == beta
    assert suggest_beta(samples[::-1], GROUPS, 10) == beta


def test_the_limit_of_kl_bounds_the_suggestion() -> None:
    samples = [sample(0, 0, 0), sample(1, 0.5, 2), sample(2, 1.0, 8), sample(4, 2.0, 30)]
    assert suggest_beta(samples, GROUPS, 40) == 4.0
    assert suggest_beta(samples, GROUPS, 10) == 2.0
    assert suggest_beta(samples, GROUPS, 3) == 1.0
    assert suggest_beta(samples, GROUPS, 1) == 0.0


def test_without_scores_nothing_is_suggested() -> None:
    unscored = BetaSample(1.0, np.full(40, math.nan), np.ones(40))
    assert suggest_beta([sample(0, 0, 0), unscored], GROUPS, 10) == 0.0


# --- on an engine ---


@pytest.fixture
def resident(engine: Any, tmp_path: Path) -> str:
    """Load a head that prefers the first 60 tokens, and return its name."""
    frozen = engine.frozen.frozen("tiny")
    b = torch.zeros(frozen.vocabulary)
    b[:60] = 1.0
    head.write(
        tmp_path / "v.safetensors",
        {"P": torch.zeros(1, 32), "E": torch.zeros(frozen.vocabulary, 1), "b": b},
        frozen,
        {},
    )
    asyncio.run(engine.add_value("v", HeadValue(str(tmp_path / "v.safetensors"))))
    return "v"


@pytest.mark.slow
@pytest.mark.anyio
async def test_every_beta_gets_the_same_prompts_and_seeds(
    engine: Any, resident: str, recording_reward: Any, prompts: Any
) -> None:
    texts: list[str] = []

    def length(text: str) -> float:
        texts.append(text)
        return float(len(text))

    steered = Steered(engine, recording_reward(length), prompts, resident, CONFIG, SAMPLING)
    samples = [await steered.run(beta) for beta in (0.0, 1.0, 3.0)]
    frozen = []
    for i in range(30):
        draw = Draw({"messages": prompts[i % 20], "max_tokens": 6}, 1, (SAMPLING.seed + i,))
        (candidate,) = await draw_candidates(engine, draw)
        frozen.append(candidate.text)
    assert sorted(texts[:30]) == sorted(frozen)
    assert samples[0].rewards.tolist() == [len(text) for text in frozen]
    assert samples[0].kl == 0.0
    assert samples[2].kl > samples[1].kl > 0
    assert steered.groups.tolist() == [*range(20), *range(10)]
    few = await steered.run(3.0, 4)
    assert few.rewards.tolist() == samples[2].rewards[:4].tolist()


@pytest.mark.slow
@pytest.mark.anyio
async def test_the_search_steers_in_the_configured_form(
    engine: Any, resident: str, recording_reward: Any, prompts: Any
) -> None:
    kls = []
    for config in (CONFIG, replace(CONFIG, top_k="all"), replace(CONFIG, min_p=0.5)):
        steered = Steered(engine, recording_reward(), prompts, resident, config, SAMPLING)
        kls.append((await steered.run(3.0)).kl)
    assert len(set(kls)) == 3


@pytest.mark.anyio
async def test_replies_that_cannot_be_scored_are_nan(
    engine: Any, resident: str, recording_reward: Any, prompts: Any, nan_for: Any
) -> None:
    steered = Steered(engine, recording_reward(nan_for), prompts, resident, CONFIG, SAMPLING)
    result = await steered.run(1.0)
    assert set(result.rewards[np.isfinite(result.rewards)]) == {1.0}
    assert np.isnan(result.rewards).any()
    assert np.isfinite(result.kls).all()
