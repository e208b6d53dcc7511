"""The likelihood of the request's reference after each answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from infer_align.engines.fake import Fake, FakeEngine, ScriptedWords
from infer_align.errors import InvalidRequest
from infer_align.rewards.likelihood import Likelihood, LikelihoodReward
from infer_align.types import Candidate

pytestmark = pytest.mark.anyio
ASK = [{"role": "user", "content": "6 times 7?"}]
WORDS = (
    ScriptedWords({"42": -0.125}, pattern="six sevens"),
    ScriptedWords({"42": -3.0}, pattern="a guess"),
)


async def reward_on(engine: FakeEngine, **section: Any) -> LikelihoodReward:
    await engine.start()
    reward = Likelihood(**section).load()
    reward.engines = {"served": engine}
    await reward.start()
    return reward.with_parameters({"reference": "42 indeed"})


def answers(*texts: str) -> list[Candidate]:
    return [Candidate(i, {"message": {"content": text}}) for i, text in enumerate(texts)]


async def test_the_reference_is_read_after_each_answer() -> None:
    engine = Fake(words=WORDS).load()
    reward = await reward_on(engine)
    scores = await reward.score(ASK, answers("It is six sevens. ", "Just a guess."))
    np.testing.assert_allclose(scores.values[0, 0], [-0.125 - 1.0, -3.0 - 1.0])
    first = engine.sequence_queries[0]
    assert first.body["messages"][-1] == {
        "role": "assistant",
        "content": "It is six sevens.\n\nAnswer:",
    }
    assert first.body["continue_final_message"] is True
    assert first.texts == (" 42 indeed",)
    assert scores.usage.reward_tokens > 0


async def test_a_text_completion_continues_its_prompt() -> None:
    engine = Fake(words=WORDS).load()
    reward = await reward_on(engine, lead=" =")
    completion = Candidate(0, {"text": " is six sevens", "finish_reason": "stop"})
    scores = await reward.score([{"role": "user", "content": "42"}], [completion])
    np.testing.assert_allclose(scores.values, [[[-1.125]]])
    assert engine.sequence_queries[0].body == {"prompt": "42 is six sevens ="}


async def test_an_answer_that_does_not_fit_fails_alone() -> None:
    reward = await reward_on(Fake(words=WORDS, context_length=9).load())
    scores = await reward.score(ASK, answers("a guess", "a b c d e f g h i"))
    assert np.isfinite(scores.values[0, 0, 0])
    assert np.isnan(scores.values[0, 0, 1])
    assert "do not fit" in (scores.notes[1] or "")


def test_a_request_without_a_reference_is_refused() -> None:
    reward = Likelihood().load()
    reward.engines = {"served": Fake().load()}
    assert reward.named_only
    with pytest.raises(InvalidRequest, match=r"^w: needs the reference .*\"reference\"") as caught:
        reward.check("w")
    assert caught.value.param == "w"
