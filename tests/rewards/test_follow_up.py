"""The follow-up likelihood: satisfied against dissatisfied next turns of the user."""

from __future__ import annotations

import numpy as np
import pytest

from infer_align.config.schema import parse
from infer_align.engines.fake import Fake, ScriptedWords
from infer_align.errors import ConfigError
from infer_align.rewards.follow_up import DISSATISFIED, SATISFIED, FollowUp
from infer_align.types import Candidate

pytestmark = pytest.mark.anyio
ASK = [{"role": "user", "content": "hello"}]
WORDS = (
    ScriptedWords({"thanks": -0.5}, pattern="good"),
    ScriptedWords({"wrong": -0.25}, pattern="bad"),
)


def answers(*texts: str) -> list[Candidate]:
    return [Candidate(i, {"message": {"content": text}}) for i, text in enumerate(texts)]


async def test_the_score_is_the_difference_of_means_per_token() -> None:
    engine = Fake(words=WORDS).load()
    await engine.start()
    section = FollowUp(satisfied=("thanks", "many thanks"), dissatisfied=("wrong it is",))
    reward = section.load()
    reward.engines = {"served": engine}
    await reward.start()
    scores = await reward.score(ASK, answers("good", "bad"))
    good = np.mean([-0.5, (-1.0 - 0.5) / 2]) - (-1.0)
    bad = -1.0 - np.mean((-0.25, -1.0, -1.0))
    np.testing.assert_allclose(scores.values[0, 0], [good, bad])
    for query, answer in zip(engine.sequence_queries, ("good", "bad"), strict=True):
        assert query.role == "user"
        assert query.body["messages"] == [*ASK, {"role": "assistant", "content": answer}]
        assert query.texts == ("thanks", "many thanks", "wrong it is")
    assert scores.usage.reward_tokens == 2 * (2 + 6)
    assert "3 short texts" in reward.cost


async def test_the_tool_calls_of_an_answer_are_read_too() -> None:
    engine = Fake(words=WORDS).load()
    await engine.start()
    reward = FollowUp().load()
    reward.engines = {"served": engine}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    await reward.score(ASK, [Candidate(0, {"message": {"content": None, "tool_calls": [call]}})])
    (query,) = engine.sequence_queries
    assert query.body["messages"][-1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'


async def test_an_engine_that_fails_on_one_answer_leaves_the_others() -> None:
    words = (ScriptedWords(pattern="bad", error="no"), *WORDS)
    engine = Fake(words=words).load()
    await engine.start()
    reward = FollowUp().load()
    reward.engines = {"served": engine}
    scores = await reward.score(ASK, answers("good", "bad"))
    assert np.isfinite(scores.values[0, 0, 0])
    assert np.isnan(scores.values[0, 0, 1])
    assert scores.notes == (None, "no")


def test_the_default_texts_are_balanced() -> None:
    assert len(SATISFIED) == len(DISSATISFIED) == 6
    assert not set(SATISFIED) & set(DISSATISFIED)


@pytest.mark.parametrize("texts", [[], [" "], ["a"] * 65, "thanks"])
def test_texts_that_are_none_are_refused(texts: object) -> None:
    with pytest.raises(ConfigError, match=r"rewards\.x\.satisfied"):
        parse(FollowUp, {"satisfied": texts}, "rewards.x", ConfigError)
