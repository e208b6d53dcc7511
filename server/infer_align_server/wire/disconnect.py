"""Cancellation of work when its client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


class ClientLeft(Exception):
    """The client closed the connection before it received the response."""


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

    async def watch() -> None:
        nonlocal disconnected
        await _disconnect(receive)
        disconnected = True
        worker.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        # After uncancel() the count is zero if nothing else cancelled this task too.
        if disconnected and not worker.uncancel():
            raise ClientLeft from None
        raise
    finally:
        watcher.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
