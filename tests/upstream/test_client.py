"""One call: what is tried again, for how long is waited, and what is told of an error."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from infer_align.errors import Unavailable
from infer_align.upstream import Upstream as Section
from infer_align.upstream import UpstreamFailed
from infer_align.upstream.client import MAX_MESSAGE, Client, Tally
from infer_align.upstream.reading import seconds, told
from tests.engines.openai.upstream import Upstream, reply, upstream

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def up() -> Iterator[Upstream]:
    with upstream() as app:
        app.answer = lambda _, body: {"got": body}
        yield app


@pytest.fixture
async def client(up: Upstream) -> AsyncIterator[Callable[..., Any]]:
    up.reset()
    up.behave = lambda _, __: "ok"
    made: list[Client] = []

    async def make(**config: Any) -> Client:
        made.append(Client(Section(**{"urls": up.url, **config})))
        await made[-1].start()
        return made[-1]

    yield make
    for one in made:
        await one.close()


async def test_the_body_is_sent_as_it_stands(client: Any) -> None:
    body = {"b": [1, None, {"\u00fc": "\U0001f989"}], "a": 1.5, "big": 2**63}
    answer = await (await client()).post("/x", body)
    assert answer == {"got": body}
    assert list(answer["got"]) == list(body)


@pytest.mark.parametrize(("retries", "calls"), [(0, 1), (2, 3)])
async def test_calls_are_counted(up: Upstream, client: Any, retries: int, calls: int) -> None:
    up.behave = lambda _, __: "error_503"
    tally = Tally()
    with pytest.raises(UpstreamFailed, match="loading"):
        await (await client(retries=retries)).post("/x", {}, tally=tally)
    assert tally.calls == up.calls == calls


@pytest.mark.parametrize(
    ("fault", "kept_alive", "calls"),
    [
        ("reset", True, 2),
        ("reset", False, 1),
        ("slow_reset", True, 1),
        ("error_502", True, 1),
        ("hang", True, 1),
        ("error_503", True, 2),
    ],
)
async def test_what_may_have_been_read_is_not_said_again(
    up: Upstream, client: Any, fault: str, kept_alive: bool, calls: int
) -> None:
    """A lost connection is tried again only where it had been kept alive, and is lost at once: there nobody has read anything."""
    asked = await client(retries=1, timeout_seconds=1.0)
    if kept_alive:
        await asked.post("/x", {})
    up.reset()
    up.behave = lambda _, __: fault
    with pytest.raises(UpstreamFailed):
        await asked.post("/x", {})
    assert up.calls == calls


async def test_a_connection_that_was_closed_meanwhile_costs_nothing(
    up: Upstream, client: Any
) -> None:
    asked, tally = await client(), Tally()
    await asked.post("/x", {})
    up.reset()
    up.behave = lambda call, _: "reset" if call == 0 else "ok"
    assert await asked.post("/x", {"a": 1}, tally=tally) == {"got": {"a": 1}}
    assert tally.calls == up.calls == 2


async def test_it_must_be_open(up: Upstream) -> None:
    unstarted = Client(Section(urls=up.url))
    with pytest.raises(Unavailable):
        await unstarted.post("/x", {})
    assert unstarted.pool.hosts[0].running == 0


async def test_an_error_is_told_without_the_key_and_not_at_length(
    up: Upstream, client: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("A_KEY", "sk-very-secret")
    asked = await client(api_key_env="A_KEY")

    async def long(_: Any, __: Any, send: Any) -> None:
        await reply(
            send, 418, {"error": {"message": "sk-very-secret is no teapot " + "x" * 50_000}}
        )

    monkeypatch.setattr(
        "tests.engines.openai.upstream.Faults.long", staticmethod(long), raising=False
    )
    up.behave = lambda _, __: "long"
    with pytest.raises(UpstreamFailed) as failed:
        await asked.post("/x", {})
    assert failed.value.status == 418
    assert failed.value.message.startswith("*** is no teapot")
    assert len(failed.value.message) <= MAX_MESSAGE
    assert up.headers[-1]["authorization"] == "Bearer sk-very-secret"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"error": {"message": "m", "param": "p", "code": "c"}}', ("m", "p", "c")),
        ('{"error": {"message": "m", "param": ["p"], "code": 7}}', ("m", None, None)),
        ('{"error": "m"}', ("m", None, None)),
        ('{"message": "m"}', ("m", None, None)),
        ('{"detail": "m"}', ("m", None, None)),
        ("[1]", ("[1]", None, None)),
        ("{}", ("", None, None)),
        ("<html>", ("", None, None)),
        ("[" * 100_000, ("", None, None)),
    ],
)
def test_errors_in_the_wild(text: str, found: tuple[str, str | None, str | None]) -> None:
    assert told(text) == found


def test_retry_after() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 25 < (seconds(soon) or 0) <= 30
    assert seconds("7") == 7.0
    assert seconds("-3") == 0.0
    assert seconds("1e300") == 86_400.0
    for nothing in (None, "", "soon", "nan days"):
        assert seconds(nothing) is None
