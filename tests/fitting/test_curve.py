"""Test the curve of reward against KL over beta, and the suggested beta."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from infer_align.fitting.curve import BetaPoint, beta_grid, reward_kl_curve, suggest_beta
from infer_align.fitting.samples import SamplingConfig, draw_candidates
from infer_align.types import Draw
from infer_align.values import head
from infer_align.values.head import HeadValue

SAMPLING = SamplingConfig("tiny", "length", "mean", replies_per_prompt=8, max_tokens=6, seed=5)


def points(
    *rewards: float, grid: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0), error: float = 0.1
) -> list[BetaPoint]:
    return [
        BetaPoint(beta, reward, error, beta, 0.1)
        for beta, reward in zip(grid, rewards, strict=True)
    ]


@pytest.mark.parametrize(
    ("rewards", "beta"),
    [
        ((0.0, 0.5, 1.0, 2.0), 4.0),
        ((0.0, 0.5, 1.95, 2.0), 2.0),
        ((0.0, 1.92, 1.95, 2.0), 1.0),
        ((0.0, 2.0, 1.95, 1.5), 1.0),
        ((1.0, 1.0, 1.0, 1.0), 0.0),
        ((0.0, 0.5, math.nan, math.nan), 1.0),
        ((math.nan,) * 4, 0.0),
    ],
)
def test_the_smallest_beta_within_one_standard_error_of_the_best_is_suggested(
    rewards: Any, beta: float
) -> None:
    assert suggest_beta(points(*rewards)) == beta
    assert suggest_beta(points(*rewards)[::-1]) == beta


def test_the_smallest_beta_is_the_one_nearest_to_zero() -> None:
    assert suggest_beta(points(2.0, 1.99, 2.0, 0.0, grid=(-4.0, -1.0, 2.0, 0.0))) == -1.0


def test_the_grid_starts_with_the_frozen_model() -> None:
    assert [*beta_grid(16.0)] == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0]


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
async def test_the_curve_measures_reward_and_kl_of_each_beta(
    engine: Any, resident: str, recording_reward: Any, prompts: Any, quiet: Any
) -> None:
    texts: list[str] = []

    def length(text: str) -> float:
        texts.append(text)
        return float(len(text))

    lines: list[str] = []
    betas = [0.0, 1.0, 3.0, -2.0]
    curve = await reward_kl_curve(
        engine, recording_reward(length), prompts, resident, betas, SAMPLING, lines.append
    )
    assert len(lines) == 4
    assert [p.beta for p in curve] == betas
    frozen = []
    for i, messages in enumerate(prompts):
        draw = Draw({"messages": messages, "max_tokens": 6}, 1, (SAMPLING.seed + i,))
        (candidate,) = await draw_candidates(engine, draw)
        frozen.append(candidate.text)
    assert sorted(texts[:20]) == sorted(frozen)
    assert curve[0].reward == pytest.approx(sum(map(len, frozen)) / 20)
    assert (curve[0].kl, curve[0].kl_se) == (0.0, 0.0)
    assert all(p.kl > 0 for p in curve[1:])
    assert curve[2].kl > curve[1].kl
    assert all(p.reward_se > 0 for p in curve)


@pytest.mark.anyio
async def test_replies_that_cannot_be_scored_do_not_count(
    engine: Any, resident: str, recording_reward: Any, prompts: Any, quiet: Any, nan_for: Any
) -> None:
    (some,) = await reward_kl_curve(
        engine, recording_reward(nan_for), prompts, resident, [1.0], SAMPLING, quiet
    )
    assert (some.reward, some.reward_se) == (1.0, 0.0)
    (none,) = await reward_kl_curve(
        engine, recording_reward(lambda _: math.nan), prompts, resident, [1.0], SAMPLING, quiet
    )
    assert math.isnan(none.reward)
    assert math.isfinite(none.kl)
