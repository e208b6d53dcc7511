"""Work is cancelled when its client leaves, and only then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from infer_align_server.wire.disconnect import ClientLeft, until_client_leaves, watched

pytestmark = pytest.mark.anyio


class Client:
    """The ASGI channel of a client that sends nothing until it leaves."""

    def __init__(self) -> None:
        self.is_gone = asyncio.Event()

    async def receive(self) -> Any:
        await self.is_gone.wait()
        return {"type": "http.disconnect"}


async def test_the_result_of_finished_work_is_returned() -> None:
    async def work() -> int:
        return 5

    assert await until_client_leaves(Client().receive, work()) == 5


async def test_an_error_of_the_work_is_raised() -> None:
    async def work() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await until_client_leaves(Client().receive, work())


async def test_work_is_cancelled_when_the_client_leaves() -> None:
    client = Client()
    cancelled = asyncio.Event()

    async def work() -> None:
        client.is_gone.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(ClientLeft):
        await until_client_leaves(client.receive, work())
    assert cancelled.is_set()


async def test_a_cancellation_from_elsewhere_stays_one() -> None:
    started = asyncio.Event()

    async def work() -> None:
        started.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(until_client_leaves(Client().receive, work()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_messages_before_the_disconnect_are_ignored() -> None:
    messages = iter([{"type": "http.request"}, {"type": "http.request"}])
    last_read = asyncio.Event()

    async def receive() -> Any:
        message = next(messages, None)
        if message is None:
            last_read.set()
            await asyncio.Event().wait()
        return message

    async def work() -> str:
        await last_read.wait()
        return "done"

    assert await until_client_leaves(receive, work()) == "done"


class Watched:
    """A connection that reports its end itself."""

    def __init__(self) -> None:
        self.watches: list[Callable[[], None]] = []

    def watch(self, leave: Callable[[], None]) -> Callable[[], object]:
        self.watches.append(leave)
        return lambda: self.watches.remove(leave)


async def test_a_connection_that_reports_its_end_needs_no_task() -> None:
    connection = Watched()
    watched.set(connection)

    async def unread() -> Any:
        raise AssertionError

    async def work() -> str:
        return "done"

    assert await until_client_leaves(unread, work()) == "done"
    assert not connection.watches, "the watch has ended"

    async def endless() -> None:
        connection.watches[0]()
        await asyncio.Event().wait()

    with pytest.raises(ClientLeft):
        await until_client_leaves(unread, endless())
    assert not connection.watches
