"""The density ratio: how much likelier a better context makes an answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from infer_align.config import Limits
from infer_align.engines.fake import Fake, FakeEngine, Reply, ScriptedWords
from infer_align.errors import ConfigError, InvalidRequest, Unsupported
from infer_align.flow.plan import make_plan
from infer_align.flow.request import parse_request
from infer_align.flow.run import align
from infer_align.rewards.density_ratio import EMPTY, DensityRatio, DensityRatioReward
from infer_align.types import Candidate, Capability

pytestmark = pytest.mark.anyio
ASK = [{"role": "user", "content": "hello"}]
WORDS = (
    ScriptedWords({"yes": -0.25, "please": -0.5}, pattern="politely", other=-2.0),
    ScriptedWords({"no": -0.5}, pattern="rudely", other=-1.5),
)


def answers(*texts: str) -> list[Candidate]:
    return [Candidate(i, {"message": {"content": text}}) for i, text in enumerate(texts)]


async def reward_on(engine: FakeEngine, **section: Any) -> DensityRatioReward:
    await engine.start()
    reward = DensityRatio(**section).load()
    reward.engines = {"served": engine}
    await reward.start()
    return reward


async def test_the_score_is_the_difference_of_two_log_probabilities() -> None:
    engine = Fake(words=WORDS).load()
    reward = await reward_on(engine, prompt="Answer politely.")
    scores = await reward.score(ASK, answers("yes please", "no"))
    # Without the prompt every word has -1.
    np.testing.assert_allclose(scores.values[0, 0], [-0.75 + 2.0, -2.0 + 1.0])
    assert scores.notes == (None, None)
    first, second = engine.sequence_queries
    assert first.body["messages"] == [{"role": "system", "content": "Answer politely."}, *ASK]
    assert second.body["messages"] == ASK


async def test_the_mean_is_per_token_of_the_first_engine() -> None:
    reward = await reward_on(Fake(words=WORDS).load(), prompt="politely", per_token=True)
    scores = await reward.score(ASK, answers("yes please", "no"))
    np.testing.assert_allclose(scores.values[0, 0], [1.25 / 2, -1.0])


@pytest.mark.parametrize("per_token", [False, True])
async def test_an_empty_answer_is_scored_only_among_empty_ones(per_token: bool) -> None:
    reward = await reward_on(Fake(words=WORDS).load(), prompt="politely", per_token=per_token)
    scores = await reward.score(ASK, answers("", "no", " \n"))
    np.testing.assert_allclose(scores.values[0, 0], [np.nan, -1.0, np.nan])
    assert scores.notes == (EMPTY, None, EMPTY)
    scores = await reward.score(ASK, answers("", ""))
    np.testing.assert_allclose(scores.values[0, 0], [0.0, 0.0])
    assert scores.notes == (None, None)


@pytest.mark.parametrize(("texts", "returned"), [(("", "no"), "no"), (("", ""), "")])
async def test_an_empty_answer_does_not_win(texts: tuple[str, ...], returned: str) -> None:
    engine = Fake(replies=tuple(Reply(text) for text in texts), words=WORDS).load()
    rewards = {"polite": await reward_on(engine, prompt="politely")}
    request = parse_request({"messages": ASK, "align": {"best_of_n": {"n": 2}}}, "chat", presets={})
    plan = make_plan(request, engine, rewards, {"polite": 1.0}, Limits())
    response = await align(plan, engine)
    assert [candidate.text for candidate in response.returned] == [returned]


async def test_both_prompts_end_the_system_message_of_the_client() -> None:
    engine = Fake(words=WORDS).load()
    reward = await reward_on(engine, prompt="politely", negative_prompt="rudely")
    system = {"role": "system", "content": "Be brief."}
    scores = await reward.score([system, *ASK], answers("yes"))
    np.testing.assert_allclose(scores.values, [[[-0.25 + 1.5]]])
    contents = [query.body["messages"][0]["content"] for query in engine.sequence_queries]
    assert contents == ["Be brief.\n\npolitely", "Be brief.\n\nrudely"]
    assert system["content"] == "Be brief."


async def test_two_engines_read_the_same_conversation() -> None:
    tuned = Fake(words=(ScriptedWords({"yes": -0.1}),)).load()
    base = Fake(words=(ScriptedWords({"yes": -0.7}),)).load()
    await tuned.start()
    await base.start()
    reward = DensityRatio(negative_engine="base").load()
    reward.engines = {"served": tuned, "base": base}
    await reward.start()
    scores = await reward.score(ASK, answers("yes"))
    np.testing.assert_allclose(scores.values, [[[0.6]]])
    assert tuned.sequence_queries == base.sequence_queries


async def test_equal_answers_are_read_once_and_the_tokens_are_counted() -> None:
    engine = Fake(words=WORDS).load()
    reward = await reward_on(engine, prompt="politely")
    scores = await reward.score(ASK, answers("yes", "yes", "no"))
    assert scores.values[0, 0, 0] == scores.values[0, 0, 1]
    assert [query.texts for query in engine.sequence_queries] == [("yes", "no")] * 2
    prompts = len(["politely", "hello"]) + len(["hello"])
    assert scores.usage.reward_tokens == prompts + 2 * 2
    assert reward.worst_case_tokens(3) == 0, "nothing is sampled"
    assert "twice" in reward.cost


async def test_a_text_completion_is_read_as_one() -> None:
    engine = Fake(words=WORDS).load()
    reward = await reward_on(engine, prompt="politely")
    completion = Candidate(0, {"text": "yes", "finish_reason": "stop"})
    scores = await reward.score([{"role": "user", "content": "Once"}], [completion])
    np.testing.assert_allclose(scores.values, [[[-0.25 + 1.0]]])
    assert {query.kind for query in engine.sequence_queries} == {"completion"}
    prompts = [query.body["prompt"] for query in engine.sequence_queries]
    assert prompts == ["politely\n\nOnce", "Once"]


async def test_an_answer_that_does_not_fit_the_context_fails_alone() -> None:
    reward = await reward_on(Fake(words=WORDS, context_length=6).load(), prompt="politely")
    scores = await reward.score(ASK, answers("yes", "a b c d e f g"))
    np.testing.assert_allclose(scores.values[0, 0, 0], 0.75)
    assert np.isnan(scores.values[0, 0, 1])
    assert scores.notes[0] is None
    assert "do not fit the context of 6" in (scores.notes[1] or "")


async def test_an_engine_that_fails_leaves_no_score() -> None:
    broken = (ScriptedWords(pattern="politely", error="out of memory"),)
    reward = await reward_on(Fake(words=broken).load(), prompt="politely")
    scores = await reward.score(ASK, answers("yes", "no"))
    assert np.isnan(scores.values).all()
    assert scores.notes == ("out of memory", "out of memory")
    assert scores.failure is not None


async def test_a_request_may_bring_its_own_prompts() -> None:
    engine = Fake(words=WORDS).load()
    reward = await reward_on(engine, prompt="politely", description="polite")
    changed = reward.with_parameters({"prompt": "rudely", "per_token": True})
    scores = await changed.score(ASK, answers("no no"))
    np.testing.assert_allclose(scores.values, [[[(-1.0 + 2.0) / 2]]])
    assert reward.config.prompt == "politely"


@pytest.mark.parametrize(
    "section", [{}, {"prompt": "a", "negative_prompt": "a"}, {"negative_engine": "served"}]
)
def test_contexts_that_do_not_differ_are_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="compares a context with itself"):
        DensityRatio(**section).load()


async def test_parameters_that_make_both_contexts_equal_are_refused() -> None:
    reward = await reward_on(Fake().load(), prompt="politely")
    same = reward.with_parameters({"negative_prompt": "politely"})
    with pytest.raises(InvalidRequest, match=r"^align\.rewards\.x: compares a context") as caught:
        same.check("align.rewards.x")
    assert caught.value.param == "align.rewards.x"


async def test_an_engine_that_is_not_configured_is_refused() -> None:
    reward = DensityRatio(prompt="a", engine="sevred").load()
    reward.engines = {"served": Fake().load()}
    with pytest.raises(ConfigError, match="did you mean 'served'"):
        await reward.start()


class Silent(FakeEngine):
    """Does not report log-probabilities of given texts."""

    capabilities = FakeEngine.capabilities - {Capability.SEQUENCE_LOGPROBS}


def test_an_engine_that_cannot_read_is_refused_by_name() -> None:
    reward = DensityRatio(prompt="a").load()
    reward.engines = {"served": Silent(Fake()), "other": Fake().load()}
    with pytest.raises(Unsupported, match=r"x: needs sequence_logprobs.*'other'"):
        reward.check("x")
