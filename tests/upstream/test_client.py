"""A call is retried only where that is safe, and its errors are short and hold no key."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from infer_align.errors import Unavailable
from infer_align.upstream import Upstream as Section
from infer_align.upstream import UpstreamFailed, client
from infer_align.upstream.client import MAX_MESSAGE, CallCounter, Client
from tests.engines.openai.upstream import FakeUpstream, Faults, fake_upstream, reply

pytestmark = pytest.mark.anyio

MakeClient = Callable[..., Awaitable[Client]]


@pytest.fixture(scope="module")
def up() -> Iterator[FakeUpstream]:
    with fake_upstream() as app:
        app.answer = lambda _, body: {"got": body}
        yield app


@pytest.fixture
async def make_client(up: FakeUpstream) -> AsyncIterator[MakeClient]:
    up.clear_log()
    up.behave = lambda _, __: "ok"
    clients: list[Client] = []

    async def make(**config: Any) -> Client:
        started = Client(Section(**{"urls": up.url, **config}))
        await started.start()
        clients.append(started)
        return started

    yield make
    for each in clients:
        await each.close()


@pytest.fixture
def no_lost_connection_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, even a connection that is lost at once may be noticed late."""
    monkeypatch.setattr(client, "STALE_SECONDS", 60.0)


async def test_the_body_is_sent_unchanged(make_client: MakeClient) -> None:
    body = {"b": [1, None, {"\u00fc": "\U0001f989"}], "a": 1.5, "big": 2**63}
    answer: Any = await (await make_client()).post("/x", body)
    assert answer == {"got": body}
    assert list(answer["got"]) == list(body)


@pytest.mark.parametrize(("retries", "calls"), [(0, 1), (2, 3)])
async def test_calls_are_counted(
    up: FakeUpstream, make_client: MakeClient, retries: int, calls: int
) -> None:
    up.behave = lambda _, __: "error_503"
    counter = CallCounter()
    with pytest.raises(UpstreamFailed, match="loading"):
        await (await make_client(retries=retries)).post("/x", {}, counter=counter)
    assert counter.calls == up.calls == calls


async def assert_calls(
    up: FakeUpstream, sender: Client, fault: str, calls: int, *, kept_alive: bool
) -> None:
    """Assert how many calls one post makes before it fails."""
    if kept_alive:
        await sender.post("/x", {})
    up.clear_log()
    up.behave = lambda _, __: fault
    with pytest.raises(UpstreamFailed):
        await sender.post("/x", {})
    assert up.calls == calls


@pytest.mark.usefixtures("no_lost_connection_is_late")
@pytest.mark.parametrize(("kept_alive", "calls"), [(True, 2), (False, 1)])
async def test_a_connection_lost_at_once_is_retried_if_it_was_kept_alive(
    up: FakeUpstream, make_client: MakeClient, kept_alive: bool, calls: int
) -> None:
    sender = await make_client(retries=1)
    await assert_calls(up, sender, "reset", calls, kept_alive=kept_alive)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "calls"), [("slow_reset", 1), ("error_502", 1), ("hang", 1), ("error_503", 2)]
)
async def test_a_request_that_may_have_been_processed_is_not_retried(
    up: FakeUpstream, make_client: MakeClient, fault: str, calls: int
) -> None:
    sender = await make_client(retries=1, timeout_seconds=2.0)
    await assert_calls(up, sender, fault, calls, kept_alive=True)


@pytest.mark.usefixtures("no_lost_connection_is_late")
async def test_a_retry_after_a_stale_connection_succeeds_and_is_counted(
    up: FakeUpstream, make_client: MakeClient
) -> None:
    sender = await make_client()
    counter = CallCounter()
    await sender.post("/x", {})
    up.clear_log()
    up.behave = lambda call, _: "reset" if call == 0 else "ok"
    answer: Any = await sender.post("/x", {"a": 1}, counter=counter)
    assert answer == {"got": {"a": 1}}
    assert counter.calls == up.calls == 2


async def test_a_client_that_is_not_started_is_unavailable(up: FakeUpstream) -> None:
    unstarted = Client(Section(urls=up.url))
    with pytest.raises(Unavailable):
        await unstarted.post("/x", {})
    assert unstarted.pool.hosts[0].running == 0


async def test_an_error_message_is_short_and_holds_no_key(
    up: FakeUpstream, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", "sk-very-secret")
    sender = await make_client(api_key_env="A_KEY")

    async def long(_: Any, __: Any, send: Any) -> None:
        message = "sk-very-secret is no teapot " + "x" * 50_000
        await reply(send, 418, {"error": {"message": message}})

    monkeypatch.setattr(Faults, "long", staticmethod(long), raising=False)
    up.behave = lambda _, __: "long"
    with pytest.raises(UpstreamFailed) as raised:
        await sender.post("/x", {})
    assert raised.value.status == 418
    assert raised.value.message.startswith("*** is no teapot")
    assert len(raised.value.message) <= MAX_MESSAGE
    assert up.headers[-1]["authorization"] == "Bearer sk-very-secret"
