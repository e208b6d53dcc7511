"""The shipped values steer the shipped model as intended, and their report fits this code."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from benchmarks.demo import values
from infer_align import config as configuration
from infer_align import demo
from infer_align.demo import world
from infer_align.fitting.samples import score_candidates
from infer_align.steering import Steering
from infer_align.types import Draw

pytestmark = pytest.mark.slow

BETA = 6.0


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    engine = configuration.load(None, ["engine.threads=1"]).load_engine()
    asyncio.run(engine.start())
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(scope="module")
def measured(served: Any, finish: Any) -> Any:
    """`measured({"brief": 4.0})`: rewards and word counts of 60 seeded, steered replies."""
    results: dict[str, Any] = {}

    async def replies(beta: dict[str, float]) -> Any:
        reward = values.REWARD_LOADERS["helpful"]()
        await reward.start()
        rewards = []
        words = []

        async def draw_two(i: int, text: str) -> None:
            messages = [{"role": "user", "content": text}]
            steering = Steering(beta, 20, "keep") if beta else None
            body = {"messages": messages, "max_tokens": 64}
            draw = Draw(body, 2, (2 * i, 2 * i + 1), steering=steering)
            candidates, _ = await finish(served, draw)
            rewards.extend(await score_candidates(reward, messages, candidates, "uwo"))
            words.extend(len(c.text.split()) for c in candidates)

        questions = world.prompts(30, seed=505)
        await asyncio.gather(*(draw_two(i, text) for i, text in enumerate(questions)))
        await reward.close()
        return np.array(rewards), np.array(words)

    def measure(beta: dict[str, float]) -> Any:
        key = repr(beta)
        if key not in results:
            results[key] = asyncio.run(replies(beta))
        return results[key]

    return measure


def higher(first: Any, second: Any) -> bool:
    """Return True if the first mean is higher by more than 3 standard errors."""
    error = (first.var(ddof=1) / len(first) + second.var(ddof=1) / len(second)) ** 0.5
    return bool(first.mean() - second.mean() > 3 * error)


@pytest.mark.parametrize("name", ["helpful", "helpful-lookahead"])
def test_helpful_raises_the_proxy_reward(measured: Any, name: str) -> None:
    frozen, _ = measured({})
    steered, _ = measured({name: BETA})
    assert higher(steered, frozen)


@pytest.mark.parametrize("name", ["brief", "brief-lookahead"])
def test_brief_shortens_replies(measured: Any, name: str) -> None:
    _, frozen = measured({})
    _, steered = measured({name: BETA})
    assert higher(frozen, steered)


def test_a_negative_weight_lengthens_replies(measured: Any) -> None:
    _, frozen = measured({})
    _, steered = measured({"brief": -BETA})
    assert higher(steered, frozen)


def test_two_values_compose(measured: Any) -> None:
    both = measured({"helpful": BETA, "brief": 4.0})
    helpful = measured({"helpful": BETA})
    frozen = measured({})
    assert higher(both[0], frozen[0])
    assert higher(helpful[1], both[1])


def test_the_lookahead_values_share_one_lm(served: Any) -> None:
    helpful = served.value("helpful-lookahead")
    brief = served.value("brief-lookahead")
    assert helpful.lm is brief.lm
    assert helpful.index != brief.index


def test_the_shipped_report_fits_this_configuration() -> None:
    report = json.loads(demo.path("values.json").read_text())
    assert report["sampling"] == asdict(values.SAMPLING), "run: python -m benchmarks.demo.values"
    for name in values.REWARD_LOADERS:
        assert report["head"][name]["held_out"]["r2"] > 0.1
        assert report["lookahead"][name]["r2"] > report["head"][name]["held_out"]["r2"], (
            "a lookahead value sees the token itself"
        )
        curve = report["head"][name]["curve"]
        assert (curve[0]["beta"], curve[0]["kl"]) == (0, 0)
        error = curve[0]["reward_se"] + curve[-1]["reward_se"]
        assert curve[-1]["reward"] > curve[0]["reward"] + 3 * error
