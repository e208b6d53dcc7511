"""Questions that are answered between two decoding steps, and sample nothing."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Pending(Generic[T]):
    """A question whose caller waits for an answer of type T.

    Attributes:
        loop: the event loop of the caller.
        answer: the result; it belongs to the event loop.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[T] = self.loop.create_future()

    def deliver(self, outcome: T | Exception) -> None:
        """Set the answer or the error; from any thread."""
        # A closed loop raises RuntimeError; then no caller waits for the answer.
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._resolve, outcome)

    def _resolve(self, outcome: T | Exception) -> None:
        # The caller may have been cancelled meanwhile.
        if self.answer.done():
            return
        if isinstance(outcome, Exception):
            self.answer.set_exception(outcome)
        else:
            self.answer.set_result(outcome)
