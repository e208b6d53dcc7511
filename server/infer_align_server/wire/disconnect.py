"""Cancellation of work when its client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from starlette.types import Receive, Scope

# The name of the ASGI extension by which a server offers its connection.
EXTENSION = "infer_align.connection"
T = TypeVar("T")


class ClientLeft(Exception):
    """The client closed the connection before it received the response."""


class Connection(Protocol):
    """A connection that reports its end without a task that waits for it."""

    def watch(self, leave: Callable[[], None]) -> Callable[[], object]:
        """Call a function when the client leaves; return one that ends the watch."""


# The connection of the running request; None if its server does not offer it.
watched: ContextVar[Connection | None] = ContextVar("watched", default=None)


def connection_of(scope: Scope) -> Connection | None:
    """Return the connection that the server offers; None for another server than ours."""
    connection: Connection | None = scope.get("extensions", {}).get(EXTENSION)
    return connection


async def until_client_leaves(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`; cancel it as soon as the client disconnects.

    Args:
        receive: The ASGI channel of the request, whose body has been read.
        work: A coroutine.

    Raises:
        ClientLeft: The client disconnected.
        RuntimeError: The caller is not in an asyncio task.
    """
    worker = asyncio.current_task()
    if worker is None:
        raise RuntimeError("until_client_leaves: the caller is not in an asyncio task.")
    disconnected = False

    def leave() -> None:
        nonlocal disconnected
        disconnected = True
        worker.cancel()

    connection = watched.get()
    end_watch = connection.watch(leave) if connection else _start_watch(receive, leave)
    try:
        return await work
    except asyncio.CancelledError:
        # After uncancel() the count is zero if nothing else cancelled this task too.
        if disconnected and not worker.uncancel():
            raise ClientLeft from None
        raise
    finally:
        end_watch()


def _start_watch(receive: Receive, leave: Callable[[], None]) -> Callable[[], object]:
    """Wait for the disconnect in a task; return the function that ends it."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        leave()

    return asyncio.create_task(watch()).cancel
