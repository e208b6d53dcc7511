"""Who may start, who waits, who is sent away: bounded by what each request can cost at worst, shared fairly between callers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic

from infer_align.config.config import Limits
from infer_align.errors import DeadlineExceeded, Overloaded

# How much a finished request's duration moves the estimate behind Retry-After.
SMOOTHING = 0.1
MAX_CALLERS = 10_000


@dataclass(slots=True, eq=False)
class _Waiter:
    caller: str
    tokens: int
    arrival: int
    admitted: asyncio.Future[None]


class Admission:
    """Turns within `[limits]` max_running and max_running_tokens, fair between callers, first come first served for each.

    Start-time fair queueing (Goyal, Vin and Cheng, 1996): every caller has a mark, moved on by the worst case of what it
    was given, and the lowest mark is next. One caller's flood moves its own mark only, so that two callers who both wait
    are never further apart than one request of each.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._queues: dict[
            str, deque[_Waiter]
        ] = {}  # callers that wait, each with at least one request
        self._marks: dict[
            str, float
        ] = {}  # worst-case tokens a caller was given, on the common scale of `_now`
        self._now = 0.0  # the mark of the last caller admitted: where one that was away joins again
        self._arrivals = 0
        self._seconds = 1.0  # a request's usual duration
        self.running = 0
        self.running_tokens = 0

    @property
    def queued(self) -> int:
        """Requests waiting for their turn."""
        return sum(map(len, self._queues.values()))

    @asynccontextmanager
    async def admit(
        self, tokens: int, deadline_seconds: float | None = None, caller: str = ""
    ) -> AsyncIterator[None]:
        """Hold a place while the block runs; `tokens` is the request's worst case.

        Raises:
            Overloaded: the queue is full.
            DeadlineExceeded: the turn did not come in time.
        """
        if self._queues or not self._fits(tokens):
            await self._queue(caller, tokens, deadline_seconds)
        else:
            self._enter(caller, tokens)
        started = monotonic()
        try:
            yield
        finally:
            self._seconds += SMOOTHING * (monotonic() - started - self._seconds)
            self._leave(tokens)

    async def _queue(self, caller: str, tokens: int, deadline_seconds: float | None) -> None:
        if self.queued >= self._limits.max_queue:
            self._make_room(caller)
        self._arrivals += 1
        waiter = _Waiter(caller, tokens, self._arrivals, asyncio.get_running_loop().create_future())
        if caller not in self._queues:
            self._marks[caller] = self._now_or_later(caller)
        self._queues.setdefault(caller, deque()).append(waiter)
        try:
            async with asyncio.timeout(deadline_seconds):
                await waiter.admitted
        except BaseException as error:
            future = waiter.admitted
            if self._drop(waiter):
                self._wake()
            elif (
                future.done() and not future.cancelled() and not future.exception()
            ):  # its turn came as it left: pass it on
                self._leave(tokens)
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded(
                    f"no place came free within the {deadline_seconds} s allowed; allow more time."
                ) from None
            raise

    def _make_room(self, caller: str) -> None:
        """The longest queue gives up its newest request, if that still leaves it no shorter than the newcomer's.

        Raises:
            Overloaded: it is the newcomer that has to go.
        """
        longest = max(self._queues.values(), key=len, default=deque())
        if len(self._queues.get(caller, ())) + 1 >= len(longest):
            raise self._overloaded()
        newest = longest[-1]
        self._drop(newest)
        if not newest.admitted.done():
            newest.admitted.set_exception(self._overloaded())

    def _overloaded(self) -> Overloaded:
        turns = (self.queued + 1) / self._limits.max_running
        return Overloaded(
            f"{self.running} requests are running and {self.queued} are waiting: the limit; try again later.",
            retry_after=max(1.0, turns * self._seconds),
            code="queue_full",
        )

    def _drop(self, waiter: _Waiter) -> bool:
        """Take it out of its queue; False where it is not in one any more."""
        queue = self._queues.get(waiter.caller, ())
        if waiter not in queue:
            return False
        queue.remove(waiter)  # type: ignore[union-attr]  # only a deque can hold it
        if not queue:
            del self._queues[waiter.caller]
        return True

    def _fits(self, tokens: int) -> bool:
        if self.running == 0:
            return True  # alone, a request is bounded by its own limit
        return (
            self.running < self._limits.max_running
            and self.running_tokens + tokens <= self._limits.max_running_tokens
        )

    def _enter(self, caller: str, tokens: int) -> None:
        self.running += 1
        self.running_tokens += tokens
        self._now = self._now_or_later(caller)
        self._marks[caller] = self._now_or_later(caller) + max(1, tokens)
        if len(self._marks) > MAX_CALLERS:  # a mark that is passed says nothing
            self._marks = {
                who: mark
                for who, mark in self._marks.items()
                if mark > self._now or who in self._queues
            }

    def _now_or_later(self, caller: str) -> float:
        return max(self._now, self._marks.get(caller, 0.0))

    def _leave(self, tokens: int) -> None:
        self.running -= 1
        self.running_tokens -= tokens
        self._wake()
        if not self.running:  # then nobody waits either: all start anew
            self._marks.clear()
            self._now = 0.0

    def _wake(self) -> None:
        while self._queues:
            waiter = min(
                (queue[0] for queue in self._queues.values()),
                key=lambda w: (self._marks[w.caller], w.arrival),
            )
            if not self._fits(waiter.tokens):
                return
            self._drop(waiter)
            if not waiter.admitted.cancelled():  # its client may have left in this very step
                self._enter(waiter.caller, waiter.tokens)
                waiter.admitted.set_result(None)
