"""An upstream that can be guided is recognized, and the number of its top logprobs is learned."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from infer_align.engines.openai import OpenAI
from infer_align.engines.openai.ways import GUIDE, STEER, UpstreamWays
from infer_align.errors import AlignError
from infer_align.upstream.client import Client
from infer_align.upstream.pool import Host
from tests.engines.openai.upstream import FakeUpstream, fake_upstream, reply

pytestmark = pytest.mark.anyio

WORDS = {word.encode(): token for token, word in enumerate("abcdefghijklmnopqrstuvwxyz")}


class Shower:
    """An upstream that shows top logprobs of letters.

    Args:
        ways: the ways that it knows.
        allowed: the most top logprobs that it may be asked for.
        limit: the most that it shows.
        continues: True if it continues a turn.
    """

    def __init__(
        self, ways: str = "text chat", allowed: int = 20, limit: int = 20, *, continues: bool = True
    ) -> None:
        self.ways = ways.split()
        self.allowed = allowed
        self.limit = limit
        self.continues = continues

    async def __call__(self, _: FakeUpstream, body: dict[str, Any], send: Any) -> None:
        way = self._way(body)
        k = body.get("top_logprobs" if way == "chat" else "logprobs", 0)
        if way not in self.ways or k > self.allowed:
            await reply(send, 400, {"error": {"message": "I cannot do that", "param": "logprobs"}})
            return
        await reply(send, 200, self._answer(way, min(k, self.limit), body))

    def _way(self, body: dict[str, Any]) -> str:
        if "messages" in body:
            return "chat"
        return "text" if isinstance(body["prompt"], str) else "ids"

    def _answer(self, way: str, k: int, body: dict[str, Any]) -> dict[str, Any]:
        names = [chr(ord("a") + i) for i in range(k)]
        if way == "ids":
            names = [f"token_id:{i}" for i in range(k)]
        top = {name: -1.0 - i for i, name in enumerate(names)}
        logprobs: dict[str, Any] = {"tokens": names[:1], "top_logprobs": [top]}
        if way == "chat":
            entries = [{"token": name, "logprob": value} for name, value in top.items()]
            logprobs = {"content": [{"token": "a", "top_logprobs": entries}]}
        is_continued = self.continues and body.get("continue_final_message")
        usage = {"prompt_tokens": 7 if is_continued else 10, "completion_tokens": 1}
        choice = {"index": 0, "text": "a", "logprobs": logprobs, "finish_reason": "length"}
        return {"choices": [choice], "usage": usage}


@pytest.fixture(scope="module")
def app() -> Iterator[FakeUpstream]:
    with fake_upstream() as running:
        yield running


@pytest.fixture
def up(app: FakeUpstream) -> FakeUpstream:
    app.reset()
    return app


@pytest.fixture
async def client(up: FakeUpstream) -> AsyncIterator[Client]:
    client = Client(OpenAI(urls=up.url))
    await client.start()
    yield client
    await client.close()


def ways() -> UpstreamWays:
    return UpstreamWays(WORDS, lambda _: [0, 1])


def only_host(client: Client) -> Host:
    (host,) = client.pool.hosts
    return host


@pytest.mark.parametrize(
    ("upstream", "way", "width"),
    [
        (Shower("ids text chat"), "ids", 20),
        (Shower(), "text", 20),
        (Shower("chat"), "chat", 20),
        (Shower(allowed=5), "text", 5),
        (Shower("ids", allowed=13), "ids", 10),
        (Shower("chat", allowed=2), "chat", 2),
        # More may be requested; what is shown counts.
        (Shower(limit=5), "text", 20),
    ],
)
async def test_an_upstream_that_shows_two_tokens_can_be_guided(
    up: FakeUpstream, client: Client, upstream: Shower, way: str, width: int
) -> None:
    up.behave = lambda _, __: upstream
    learned = ways()
    assert not learned.knows(GUIDE, only_host(client), "up")
    await learned.find({GUIDE}, client, only_host(client), "up")
    assert learned.knows(GUIDE, only_host(client), "up")
    assert learned.knows(STEER, only_host(client), "up"), "it was found on the way"
    assert learned.way("up") == way
    assert learned.width("up") == width


@pytest.mark.parametrize(
    "upstream", [Shower(limit=1), Shower(limit=0), Shower(""), Shower("chat", continues=False)]
)
async def test_other_upstreams_cannot(up: FakeUpstream, client: Client, upstream: Shower) -> None:
    up.behave = lambda _, __: upstream
    learned = ways()
    await learned.find({GUIDE}, client, only_host(client), "up")
    assert learned.knows(GUIDE, only_host(client), "up")
    assert learned.width("up") == 0


async def test_value_steering_does_not_look_for_what_guidance_needs(
    up: FakeUpstream, client: Client
) -> None:
    up.behave = lambda _, __: Shower()
    learned = ways()
    await learned.find({STEER}, client, only_host(client), "up")
    assert not learned.knows(GUIDE, only_host(client), "up")
    assert up.calls == 2, "token ids, then text"
    await learned.find({GUIDE}, client, only_host(client), "up")
    assert up.calls == 3, "the way is known"


async def test_an_upstream_that_does_not_answer_stays_unknown(
    up: FakeUpstream, client: Client
) -> None:
    up.behave = lambda _, __: "error_500"
    learned = ways()
    with pytest.raises(AlignError):
        await learned.find({GUIDE}, client, only_host(client), "up")
    assert not learned.knows(GUIDE, only_host(client), "up")
