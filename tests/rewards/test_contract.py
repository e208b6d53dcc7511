"""What every reward of the registry promises; a new file in rewards/ is tested as soon as it can be built here."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from infer_align.config import registry
from infer_align.rewards import Reward, RewardScores
from infer_align.rewards.callable import CallableReward
from infer_align.types import Candidate

pytestmark = pytest.mark.anyio
ASK = [{"role": "user", "content": "the cat"}]


@pytest.fixture(params=registry.rewards.names())
async def reward(request, reward_model):
    models = (reward_model(labels=2), reward_model(labels=2, seed=1))
    sections = {
        "classifier": {"models": models, "attributes": ("a", "b"), "dtype": "float32"},
        "rules": {"words_weight": -1.0},
    }
    if request.param == "callable":
        reward = CallableReward(lambda messages, text: len(text), "letters")
    elif request.param in {"pooling", "trust_judge", "upstream"}:
        pytest.skip("needs an engine: it has tests of its own beside this one")
    else:
        reward = registry.rewards.get(request.param)(**sections[request.param]).load()
    await reward.start()
    yield reward
    await reward.close()


def candidates(*texts: str) -> list[Candidate]:
    return [
        Candidate(i, {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"})
        for i, text in enumerate(texts)
    ]


def shape(reward: Reward, n: int) -> tuple[int, int, int]:
    return max(1, len(reward.attributes)), len(reward.members), n


async def test_is_a_reward(reward):
    assert isinstance(reward, Reward)
    assert reward.description
    assert reward.members
    assert reward.timeout_seconds > 0


@pytest.mark.parametrize("n", [0, 1, 5])
async def test_marks_have_their_shape(reward, n):
    marks = await reward.score(
        ASK, candidates(*["one two", "three", "four five six", "", "seven"][:n])
    )
    assert isinstance(marks, RewardScores)
    assert marks.values.shape == shape(reward, n)
    assert marks.values.dtype == np.float64
    assert np.isfinite(marks.values).all()
    assert len(marks.notes) in {0, n}
    assert marks.spent.reward_tokens >= 0


async def test_a_score_is_the_candidates_own(reward):
    texts = ["one two", "three", "four five six"]
    marks = await reward.score(ASK, candidates(*texts))
    turned = await reward.score(ASK, candidates(*texts[::-1]))
    np.testing.assert_allclose(marks.values, turned.values[..., ::-1], atol=1e-5)
    alone = [await reward.score(ASK, candidates(text)) for text in texts]
    np.testing.assert_allclose(
        marks.values, np.concatenate([m.values for m in alone], axis=-1), atol=1e-5
    )
    assert len(np.unique(marks.values[0, 0].round(6))) > 1


async def test_text_completions_have_no_messages(reward):
    marks = await reward.score([], [Candidate(0, {"text": "one two", "finish_reason": "length"})])
    assert marks.values.shape == shape(reward, 1)
    assert np.isfinite(marks.values).all()


async def test_many_at_once(reward):
    results = await asyncio.gather(
        *(reward.score(ASK, candidates("one", "two three")) for _ in range(16))
    )
    assert all(np.allclose(r.values, results[0].values, atol=1e-5) for r in results)
