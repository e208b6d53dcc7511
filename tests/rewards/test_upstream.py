"""Reward models on another server: their calls, members, attributes and failures."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest

from infer_align.errors import ConfigError
from infer_align.flow.plan import Plan
from infer_align.flow.scorers import Scorer
from infer_align.flow.scoring import Scoring
from infer_align.rewards.upstream import FromUpstream, UpstreamReward
from infer_align.types import Candidate, Draw
from tests.engines.openai.upstream import FakeUpstream, fake_upstream

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

MakeReward = Callable[..., Awaitable[UpstreamReward]]
QUESTION = [{"role": "user", "content": "the cat"}]
USAGE = {"prompt_tokens": 7, "total_tokens": 7}


def candidates(*texts: str) -> list[Candidate]:
    return [
        Candidate(i, {"message": {"role": "assistant", "content": text}})
        for i, text in enumerate(texts)
    ]


CANDIDATES = candidates("one", "three", "", "seventeen")
LENGTHS = [3, 5, 0, 9]
NEGATIVE_LENGTHS = [-3, -5, 0, -9]


def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Score each text by its length; a second label is the negative of it."""
    if path == "/rerank":
        scores = enumerate(len(text) for text in body["documents"])
        ranked = sorted(scores, key=lambda item: -item[1])
        results = [{"index": i, "relevance_score": length} for i, length in ranked]
        return {"results": results, "usage": USAGE}
    if path == "/score":
        lengths = [len(text) for text in body["text_2"]]
        return {"data": entries("score", lengths), "usage": USAGE}
    if "messages" in body:
        lengths = [len(body["messages"][-1]["content"])]
    else:
        lengths = [len(text.rpartition(": ")[2]) for text in body["input"]]
    pairs = [[length, -length] for length in lengths]
    if path == "/classify":
        return {"data": entries("probs", pairs), "usage": USAGE}
    return {"data": entries("data", [[[0.0, 0.0], pair] for pair in pairs]), "usage": USAGE}


def entries(name: str, values: list[Any]) -> list[dict[str, Any]]:
    return [{"index": i, name: value} for i, value in enumerate(values)]


@pytest.fixture(scope="module")
def server() -> Iterator[FakeUpstream]:
    with fake_upstream() as app:
        app.answer = answer
        yield app


@pytest.fixture
async def make_reward(server: FakeUpstream) -> AsyncIterator[MakeReward]:
    server.clear_log()
    server.behave = lambda _, __: "ok"
    rewards: list[UpstreamReward] = []

    async def make(**config: Any) -> UpstreamReward:
        config.setdefault("urls", server.url.removesuffix("/v1"))
        reward = FromUpstream(**config).load()
        rewards.append(reward)
        await reward.start()
        return reward

    yield make
    for reward in rewards:
        await reward.close()


@pytest.mark.parametrize(("api", "query"), [("score", "text_1"), ("rerank", "query")])
async def test_one_call_scores_all_candidates(
    server: FakeUpstream, make_reward: MakeReward, api: str, query: str
) -> None:
    reward = await make_reward(api=api, models=("rm",))
    scores = await reward.score(QUESTION, CANDIDATES)
    np.testing.assert_array_equal(scores.values, [[LENGTHS]])
    assert scores.usage.reward_tokens == 7
    assert scores.notes == (None,) * 4
    (body,) = server.bodies
    assert server.paths == [f"/{api}"]
    assert body["model"] == "rm"
    assert body[query] == "the cat"
    assert body["use_activation"] is False


@pytest.mark.parametrize("api", ["classify", "pooling"])
@pytest.mark.parametrize(("form", "calls"), [("messages", 4), ("text", 1)])
async def test_labels_are_members_or_attributes(
    server: FakeUpstream, make_reward: MakeReward, api: str, form: str, calls: int
) -> None:
    members = await make_reward(api=api, labels=2, input=form)
    assert len(members.members) == 2
    scores = await members.score(QUESTION, CANDIDATES)
    np.testing.assert_array_equal(scores.values, [[LENGTHS, NEGATIVE_LENGTHS]])
    assert server.calls == calls
    attributes = await make_reward(api=api, attributes=("long", "short"), input=form)
    assert attributes.attributes == ("long", "short")
    scores = await attributes.score(QUESTION, CANDIDATES)
    np.testing.assert_array_equal(scores.values, [[LENGTHS], [NEGATIVE_LENGTHS]])
    if form == "messages":
        assert server.bodies[0]["messages"][0] == QUESTION[0]
        assert "model" not in server.bodies[0]


async def test_urls_and_models_are_members(server: FakeUpstream, make_reward: MakeReward) -> None:
    url = server.url.removesuffix("/v1")
    four = await make_reward(api="score", urls=(url, url), models=("a", "b"))
    assert len(set(four.members)) == 4
    assert (await four.score(QUESTION, CANDIDATES)).values.shape == (1, 4, 4)
    assert sorted(body["model"] for body in server.bodies) == ["a", "a", "b", "b"]
    one = await make_reward(api="score", urls=(url, url), replicas=True)
    assert one.members == ("score",)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("error_500", "on fire"),
        ("garbage", "not JSON"),
        ("html", "not JSON"),
        ("reset", "lost"),
        ("no_choices", "not have the format"),
        ("error_400", "top_p"),
        ("truncated", "broke off"),
    ],
)
async def test_a_failed_call_gives_nan_and_a_note(
    server: FakeUpstream, make_reward: MakeReward, fault: str, words: str
) -> None:
    server.behave = lambda _, __: fault
    reward = await make_reward(api="score", retries=0)
    scores = await reward.score(QUESTION, CANDIDATES)
    assert np.isnan(scores.values).all()
    assert all(words in (note or "") for note in scores.notes)


async def test_one_model_fails(server: FakeUpstream, make_reward: MakeReward) -> None:
    server.behave = lambda _, body: "error_500" if body["model"] == "b" else "ok"
    reward = await make_reward(api="score", models=("a", "b"))
    scores = await reward.score(QUESTION, CANDIDATES)
    np.testing.assert_array_equal(scores.values[0, 0], LENGTHS)
    assert np.isnan(scores.values[0, 1]).all()
    assert all("b: the GPU" in (note or "") for note in scores.notes)


def is_about_three(_: int, body: dict[str, Any]) -> bool:
    """Return True for the call that scores the candidate "three"."""
    return bool(body["messages"][-1]["content"] == "three")


async def test_one_candidate_fails(server: FakeUpstream, make_reward: MakeReward) -> None:
    server.behave = lambda call, body: "error_500" if is_about_three(call, body) else "ok"
    reward = await make_reward(labels=2)
    scores = await reward.score(QUESTION, CANDIDATES)
    np.testing.assert_array_equal(scores.values[0, 0], [3, np.nan, 0, 9])
    assert [note is None for note in scores.notes] == [True, False, True, True]


@pytest.mark.parametrize("together", [True, False])
async def test_a_call_that_hangs_delays_no_other(
    server: FakeUpstream, make_reward: MakeReward, together: bool
) -> None:
    """Score all candidates together, as /v1/align/score does, or each as soon as it is finished."""
    server.behave = lambda call, body: "hang" if is_about_three(call, body) else "ok"
    reward = await make_reward(labels=2, timeout_seconds=2.0)
    assert reward.pipelined
    draw = Draw({"messages": QUESTION}, 4)
    scorer = Scorer("long", reward, 1.0)
    plan = Plan((draw,), messages=QUESTION, scorers=(scorer,), selects=True)
    async with Scoring(plan) as scoring:
        if not together:
            for candidate in CANDIDATES:
                scoring.candidate_finished(candidate)
        scores = await scoring.score(CANDIDATES)
    np.testing.assert_array_equal(scores.members["long"][0], [3, np.nan, 0, 9])
    notes = scores.notes["long"]
    assert [note is None for note in notes] == [True, False, True, True]
    assert "within 1.9 s" in (notes[1] or "")


async def test_a_model_that_hangs_delays_no_other(
    server: FakeUpstream, make_reward: MakeReward
) -> None:
    server.behave = lambda _, body: "hang" if body["model"] == "b" else "ok"
    reward = await make_reward(api="score", models=("a", "b"), timeout_seconds=2.0)
    scores = await reward.score(QUESTION, CANDIDATES)
    np.testing.assert_array_equal(scores.values[0, 0], LENGTHS)
    assert np.isnan(scores.values[0, 1]).all()
    assert all("b: no answer within" in (note or "") for note in scores.notes)


async def test_a_wrong_number_of_labels_gives_nan_and_a_note(make_reward: MakeReward) -> None:
    reward = await make_reward()
    scores = await reward.score(QUESTION, CANDIDATES)
    assert np.isnan(scores.values).all()
    assert "2 numbers per text, but 1 are configured" in (scores.notes[0] or "")


async def test_no_candidates_need_no_call(server: FakeUpstream, make_reward: MakeReward) -> None:
    reward = await make_reward()
    scores = await reward.score(QUESTION, [])
    assert scores.values.shape == (1, 1, 0)
    assert server.calls == 0


@pytest.mark.parametrize(
    "config",
    [
        {"urls": ()},
        {"urls": "ftp://x"},
        {"urls": "http://user:pass@x"},
        {"urls": "x"},
        {"api_key_env": "NO_SUCH_KEY_HERE"},
        {"api": "score", "labels": 2},
        {"attributes": ("a", "b"), "labels": 3},
    ],
)
def test_a_wrong_configuration_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as raised:
        FromUpstream(**{"urls": "http://x", **config}).load()
    assert "pass" not in raised.value.message
