"""Every reward of the registry keeps the contract of `Reward`."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from infer_align.config import registry
from infer_align.engines import Engine
from infer_align.engines.fake import Fake, ScriptedWords
from infer_align.engines.transformers import Transformers
from infer_align.rewards import Reward, RewardScores
from infer_align.rewards.agreement import AgreementReward
from infer_align.rewards.callable import CallableReward
from infer_align.types import Candidate
from infer_align.values.head import HeadValue

pytestmark = pytest.mark.anyio
ASK = [{"role": "user", "content": "the cat"}]


@pytest.fixture(params=registry.rewards.names())
async def reward(request, reward_model):
    models = (reward_model(labels=2), reward_model(labels=2, seed=1))
    sections = {
        "classifier": {"models": models, "attributes": ("a", "b"), "dtype": "float32"},
        "rules": {"words_weight": -1.0},
        "agreement": {"by": "words"},
        "density_ratio": {"prompt": "kindly"},
        "follow_up": {"satisfied": ("fine",), "dissatisfied": ("three",)},
        "likelihood": {},
    }
    engine = scripted_engine()
    if request.param == "callable":
        reward = CallableReward(lambda messages, text: len(text), "letters")
    elif request.param in {"embedding", "pooling", "trust_judge", "upstream"}:
        pytest.skip("needs a file, an engine or a server; its own tests cover the contract")
    elif request.param == "value":
        engine = demo_engine()
        reward = registry.rewards.get("value")("helpful").load()
    else:
        reward = registry.rewards.get(request.param)(**sections[request.param]).load()
    reward.engines = {"served": engine}
    await engine.start()
    await reward.start()
    if request.param == "likelihood":
        reward = reward.with_parameters({"reference": "fine"})
    yield reward
    await reward.close()
    await engine.close()


def scripted_engine() -> Engine:
    words = (
        ScriptedWords({"one": -0.5, "two": -0.25}, pattern="kindly"),
        ScriptedWords({"fine": -0.5}, pattern="two"),
        ScriptedWords({"fine": -0.25}, pattern="three"),
    )
    return Fake(words=words).load()


def demo_engine() -> Engine:
    engine = Transformers(model="demo", dtype="float32").load()
    engine.values = {"helpful": HeadValue("demo/value-helpful.safetensors")}
    return engine


def candidates(*texts: str) -> list[Candidate]:
    return [
        Candidate(i, {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"})
        for i, text in enumerate(texts)
    ]


def shape(reward: Reward, n: int) -> tuple[int, int, int]:
    return max(1, len(reward.attributes)), len(reward.members), n


async def test_a_reward_describes_itself(reward):
    assert isinstance(reward, Reward)
    assert reward.description
    assert reward.members
    assert reward.timeout_seconds > 0
    assert reward.cost


@pytest.mark.parametrize("n", [0, 1, 5])
async def test_scores_have_the_promised_shape(reward, n):
    texts = ["one two", "three", "four five six", "", "seven"]
    scores = await reward.score(ASK, candidates(*texts[:n]))
    assert isinstance(scores, RewardScores)
    assert scores.values.shape == shape(reward, n)
    assert scores.values.dtype == np.float64
    assert len(scores.notes) in {0, n}
    for i in range(n):
        # A reward may have nothing to say about an empty answer, and says why.
        is_unscored = not texts[i] and np.isnan(scores.values[..., i]).all() and scores.notes[i]
        assert is_unscored or np.isfinite(scores.values[..., i]).all()
    assert scores.usage.reward_tokens >= 0


async def test_a_score_does_not_depend_on_the_other_candidates(reward):
    if isinstance(reward, AgreementReward):
        pytest.skip("it compares the candidates")
    texts = ["one two", "three", "four five six"]
    scores = await reward.score(ASK, candidates(*texts))
    reversed_scores = await reward.score(ASK, candidates(*texts[::-1]))
    np.testing.assert_allclose(scores.values, reversed_scores.values[..., ::-1], atol=1e-5)
    alone = [await reward.score(ASK, candidates(text)) for text in texts]
    separate = np.concatenate([each.values for each in alone], axis=-1)
    np.testing.assert_allclose(scores.values, separate, atol=1e-5)
    assert len(np.unique(scores.values[0, 0].round(6))) > 1


async def test_text_completions_are_scored_without_messages(reward):
    scores = await reward.score([], [Candidate(0, {"text": "one two", "finish_reason": "length"})])
    assert scores.values.shape == shape(reward, 1)
    assert np.isfinite(scores.values).all()


async def test_concurrent_calls_give_equal_scores(reward):
    calls = [reward.score(ASK, candidates("one", "two three")) for _ in range(16)]
    results = await asyncio.gather(*calls)
    first = results[0].values
    assert all(np.allclose(result.values, first, atol=1e-5) for result in results)
