"""Reward models on another server: one call where the API is batched, members and attributes, and what a fault becomes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from infer_align.errors import ConfigError
from infer_align.flow.run import _mark, score
from infer_align.objectives import Ensemble
from infer_align.rewards.upstream import FromUpstream, UpstreamReward
from infer_align.types import Candidate, Draw, Plan
from tests.engines.openai.upstream import Upstream, upstream

pytestmark = pytest.mark.anyio
ASK = [{"role": "user", "content": "the cat"}]


def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Scores a text by its length; a second label is minus that."""
    usage = {"prompt_tokens": 7, "total_tokens": 7}
    if path == "/rerank":
        scores = enumerate(len(text) for text in body["documents"])
        ranked = sorted(scores, key=lambda item: -item[1])
        return {"results": [{"index": i, "relevance_score": s} for i, s in ranked], "usage": usage}
    if path == "/score":
        return {
            "data": [{"index": i, "score": len(text)} for i, text in enumerate(body["text_2"])],
            "usage": usage,
        }
    lengths = (
        [len(body["messages"][-1]["content"])]
        if "messages" in body
        else [len(t.rpartition(": ")[2]) for t in body["input"]]
    )
    if path == "/classify":
        return {
            "data": [{"index": i, "probs": [n, -n], "label": "x"} for i, n in enumerate(lengths)],
            "usage": usage,
        }
    return {
        "data": [{"index": i, "data": [[0.0, 0.0], [n, -n]]} for i, n in enumerate(lengths)],
        "usage": usage,
    }


@pytest.fixture(scope="module")
def server() -> Iterator[Upstream]:
    with upstream() as app:
        app.answer = answer
        yield app


@pytest.fixture
async def reward(server: Upstream) -> Any:
    server.reset()
    server.behave = lambda _, __: "ok"
    made: list[UpstreamReward] = []

    async def make(**config: Any) -> UpstreamReward:
        config.setdefault("urls", server.url.removesuffix("/v1"))
        made.append(FromUpstream(**config).load())
        await made[-1].start()
        return made[-1]

    yield make
    for one in made:
        await one.close()


def candidates(*texts: str) -> list[Candidate]:
    return [
        Candidate(i, {"message": {"role": "assistant", "content": text}})
        for i, text in enumerate(texts)
    ]


TEXTS = candidates("one", "three", "", "seventeen")
LENGTHS = [3, 5, 0, 9]


@pytest.mark.parametrize("api", ["score", "rerank"])
async def test_one_call_for_all(server: Upstream, reward: Any, api: str) -> None:
    marks = await (await reward(api=api, models=("rm",))).score(ASK, TEXTS)
    np.testing.assert_array_equal(marks.values, [[LENGTHS]])
    assert marks.spent.reward_tokens == 7
    assert marks.notes == (None,) * 4
    (body,) = server.bodies
    assert server.paths == [f"/{api}"]
    assert body["model"] == "rm"
    assert body["text_1" if api == "score" else "query"] == "the cat"
    assert body["use_activation"] is False


@pytest.mark.parametrize("api", ["classify", "pooling"])
@pytest.mark.parametrize(("way", "calls"), [("messages", 4), ("text", 1)])
async def test_labels_are_members_or_attributes(
    server: Upstream, reward: Any, api: str, way: str, calls: int
) -> None:
    members = await reward(api=api, labels=2, input=way)
    assert len(members.members) == 2
    np.testing.assert_array_equal(
        (await members.score(ASK, TEXTS)).values, [[LENGTHS, np.negative(LENGTHS)]]
    )
    assert server.calls == calls
    attributes = await reward(api=api, attributes=("long", "short"), input=way)
    assert attributes.attributes == ("long", "short")
    np.testing.assert_array_equal(
        (await attributes.score(ASK, TEXTS)).values, [[LENGTHS], [np.negative(LENGTHS)]]
    )
    if way == "messages":
        assert server.bodies[0]["messages"][0] == ASK[0]
        assert "model" not in server.bodies[0]


async def test_urls_and_models_are_members(server: Upstream, reward: Any) -> None:
    url = server.url.removesuffix("/v1")
    four = await reward(api="score", urls=(url, url), models=("a", "b"))
    assert len(set(four.members)) == 4
    assert (await four.score(ASK, TEXTS)).values.shape == (1, 4, 4)
    assert sorted(body["model"] for body in server.bodies) == ["a", "a", "b", "b"]
    one = await reward(api="score", urls=(url, url), replicas=True)
    assert one.members == ("score",)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("error_500", "on fire"),
        ("garbage", "not JSON"),
        ("html", "not JSON"),
        ("reset", "lost"),
        ("no_choices", "not what"),
        ("error_400", "top_p"),
        ("truncated", "broke off"),
    ],
)
async def test_a_fault_is_nan_with_a_note(
    server: Upstream, reward: Any, fault: str, words: str
) -> None:
    server.behave = lambda _, __: fault
    marks = await (await reward(api="score", retries=0)).score(ASK, TEXTS)
    assert np.isnan(marks.values).all()
    assert all(words in (note or "") for note in marks.notes)


async def test_one_member_fails(server: Upstream, reward: Any) -> None:
    server.behave = lambda _, body: "error_500" if body["model"] == "b" else "ok"
    marks = await (await reward(api="score", models=("a", "b"))).score(ASK, TEXTS)
    np.testing.assert_array_equal(marks.values[0, 0], LENGTHS)
    assert np.isnan(marks.values[0, 1]).all()
    assert all("b: the GPU" in (note or "") for note in marks.notes)


async def test_one_candidate_fails(server: Upstream, reward: Any) -> None:
    server.behave = lambda _, body: (
        "error_500" if body["messages"][-1]["content"] == "three" else "ok"
    )
    marks = await (await reward(labels=2)).score(ASK, TEXTS)
    np.testing.assert_array_equal(marks.values[0, 0], [3, np.nan, 0, 9])
    assert [note is None for note in marks.notes] == [True, False, True, True]


@pytest.mark.parametrize("together", [True, False])
async def test_one_call_that_hangs_takes_no_other_along(
    server: Upstream, reward: Any, together: bool
) -> None:
    """Asked about all at once, as /v1/align/score does, or about each as soon as it is finished, as a selection does."""
    server.behave = lambda _, body: "hang" if body["messages"][-1]["content"] == "three" else "ok"
    asked = await reward(labels=2, timeout_seconds=0.5)
    assert asked.pipelined
    plan = Plan((Draw({"messages": ASK}, 4),), Ensemble(), {"long": 1.0}, ASK, selects=True)
    if together:
        scores = await score(plan, {"long": asked}, TEXTS)
    else:
        early = {
            i: asyncio.create_task(_mark(asked, ASK, [candidate], None))
            for i, candidate in enumerate(TEXTS)
        }
        scores = await score(plan, {"long": asked}, TEXTS, None, {"long": early})
    np.testing.assert_array_equal(scores.members["long"][0], [3, np.nan, 0, 9])
    notes = scores.notes["long"]
    assert [note is None for note in notes] == [True, False, True, True]
    assert "within 0.475 s" in (notes[1] or "")


async def test_one_member_that_hangs_takes_no_other_along(server: Upstream, reward: Any) -> None:
    server.behave = lambda _, body: "hang" if body["model"] == "b" else "ok"
    marks = await (await reward(api="score", models=("a", "b"), timeout_seconds=0.4)).score(
        ASK, TEXTS
    )
    np.testing.assert_array_equal(marks.values[0, 0], LENGTHS)
    assert np.isnan(marks.values[0, 1]).all()
    assert all("b: no answer within" in (note or "") for note in marks.notes)


async def test_wrong_number_of_labels(reward: Any) -> None:
    marks = await (await reward()).score(ASK, TEXTS)
    assert np.isnan(marks.values).all()
    assert "2 numbers per text, configured are 1" in (marks.notes[0] or "")


async def test_nothing_to_score(server: Upstream, reward: Any) -> None:
    marks = await (await reward()).score(ASK, [])
    assert marks.values.shape == (1, 1, 0)
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
def test_what_cannot_be_configured(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        FromUpstream(**{"urls": "http://x", **config}).load()
    assert "pass" not in refused.value.message
