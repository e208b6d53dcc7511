"""Admission of requests: at most so many run at once, the others wait in a fair queue."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic

from infer_align.config import Limits
from infer_align.errors import DeadlineExceeded, Overloaded

# Weight of the newest request's duration in the moving average behind Retry-After.
SMOOTHING = 0.1
# Above this number of callers, virtual times in the past are deleted.
MAX_CALLERS = 10_000


@dataclass(slots=True, eq=False)
class _Waiter:
    """A waiting request. `admitted` gets a result or an error when it leaves the queue."""

    caller: str
    tokens: int
    arrival: int
    admitted: asyncio.Future[None]


class Admission:
    """Admits requests within `[limits]` max_running and max_running_tokens, fairly to callers.

    This is start-time fair queueing (Goyal, Vin and Cheng, 1996). Every caller has a virtual time.
    It advances by the worst case in tokens of each admitted request. The waiting caller with the
    smallest virtual time is next; requests of one caller keep their order. A caller that sends
    many requests advances only its own virtual time, so two callers that both wait are never more
    than one request of each apart.
    """

    def __init__(self, limits: Limits, *, stage: str = "running") -> None:
        """Begin with nothing that runs or waits.

        Args:
            limits: What may run and wait at once.
            stage: The participle for what an admitted request does, for messages.
        """
        self._limits = limits
        self._stage = stage
        # The waiting requests of each caller; a caller without one is absent.
        self._queues: dict[str, deque[_Waiter]] = {}
        # The virtual time of each caller, in tokens.
        self._virtual_times: dict[str, float] = {}
        # The virtual time of the last admitted caller. A caller that was absent continues here.
        self._now = 0.0
        self._arrivals = 0
        # Moving average of the duration of a request.
        self._mean_seconds = 1.0
        self.running = 0
        self.running_tokens = 0

    @property
    def queued(self) -> int:
        """Return the number of waiting requests."""
        return sum(map(len, self._queues.values()))

    @asynccontextmanager
    async def admit(
        self, tokens: int, deadline_seconds: float | None = None, caller: str = ""
    ) -> AsyncIterator[None]:
        """Wait until the request may run, and count it as running inside the block.

        Args:
            tokens: The worst case of the request.
            deadline_seconds: The longest time to wait.
            caller: The name of the caller; each caller has a queue of its own.

        Raises:
            Overloaded: The queue is full.
            DeadlineExceeded: The request was not admitted in time.
        """
        if self._queues or not self._fits(tokens):
            await self._wait(caller, tokens, deadline_seconds)
            # `_admit_waiters` has already counted it as running.
        else:
            self._enter(caller, tokens)
        start = monotonic()
        try:
            yield
        finally:
            seconds = monotonic() - start
            self._mean_seconds += SMOOTHING * (seconds - self._mean_seconds)
            self._leave(tokens)

    async def _wait(self, caller: str, tokens: int, deadline_seconds: float | None) -> None:
        if self.queued >= self._limits.max_queue:
            self._make_room(caller)
        waiter = self._enqueue(caller, tokens)
        try:
            async with asyncio.timeout(deadline_seconds):
                await waiter.admitted
        except TimeoutError:
            self._withdraw(waiter)
            raise DeadlineExceeded(
                f"The request was not admitted within its {deadline_seconds:g} s; allow more time."
            ) from None
        except BaseException:
            self._withdraw(waiter)
            raise

    def _enqueue(self, caller: str, tokens: int) -> _Waiter:
        self._arrivals += 1
        admitted = asyncio.get_running_loop().create_future()
        waiter = _Waiter(caller, tokens, self._arrivals, admitted)
        if caller not in self._queues:
            self._virtual_times[caller] = self._virtual_time(caller)
            self._queues[caller] = deque()
        self._queues[caller].append(waiter)
        return waiter

    def _withdraw(self, waiter: _Waiter) -> None:
        """Remove a request that no longer waits."""
        if self._dequeue(waiter):
            self._admit_waiters()
            return
        future = waiter.admitted
        was_admitted = future.done() and not future.cancelled() and not future.exception()
        if was_admitted:
            # It was admitted at the moment when it gave up. Pass its place on.
            self._leave(waiter.tokens)

    def _make_room(self, caller: str) -> None:
        """Refuse the newest request of the longest queue, to make room for one of `caller`.

        Raises:
            Overloaded: The new request would itself be in the longest queue.
        """
        longest = max(self._queues.values(), key=len, default=deque())
        if len(self._queues.get(caller, ())) + 1 >= len(longest):
            raise self._overloaded()
        newest = longest[-1]
        refusal = self._overloaded()
        self._dequeue(newest)
        if not newest.admitted.done():
            newest.admitted.set_exception(refusal)

    def _overloaded(self) -> Overloaded:
        turns = (self.queued + 1) / self._limits.max_running
        running = "1 request is" if self.running == 1 else f"{self.running} requests are"
        waiting = "1 is" if self.queued == 1 else f"{self.queued} are"
        return Overloaded(
            f"{running} {self._stage} and {waiting} waiting, the limit of this server; try again "
            "later.",
            retry_after=max(1.0, turns * self._mean_seconds),
            code="queue_full",
        )

    def _dequeue(self, waiter: _Waiter) -> bool:
        """Remove a request from its queue; return False if it is not in it."""
        queue = self._queues.get(waiter.caller)
        if queue is None or waiter not in queue:
            return False
        queue.remove(waiter)
        if not queue:
            del self._queues[waiter.caller]
        return True

    def _fits(self, tokens: int) -> bool:
        if self.running == 0:
            # A request that runs alone is bounded by the limit of one request.
            return True
        return (
            self.running < self._limits.max_running
            and self.running_tokens + tokens <= self._limits.max_running_tokens
        )

    def _enter(self, caller: str, tokens: int) -> None:
        self.running += 1
        self.running_tokens += tokens
        self._now = self._virtual_time(caller)
        self._virtual_times[caller] = self._now + max(1, tokens)
        if len(self._virtual_times) > MAX_CALLERS:
            self._delete_past_times()

    def _delete_past_times(self) -> None:
        """Delete virtual times in the past: their callers start again at the present one."""
        for caller, time in list(self._virtual_times.items()):
            if time <= self._now and caller not in self._queues:
                del self._virtual_times[caller]

    def _virtual_time(self, caller: str) -> float:
        return max(self._now, self._virtual_times.get(caller, 0.0))

    def _leave(self, tokens: int) -> None:
        self.running -= 1
        self.running_tokens -= tokens
        self._admit_waiters()
        if not self.running:
            # Then no request waits either. Start again from zero.
            self._virtual_times.clear()
            self._now = 0.0

    def _admit_waiters(self) -> None:
        """Admit waiting requests in order, as long as the next one fits."""
        while self._queues:
            first_of_each = [queue[0] for queue in self._queues.values()]
            waiter = min(first_of_each, key=self._order)
            if not self._fits(waiter.tokens):
                return
            self._dequeue(waiter)
            # The client may have left just now.
            if not waiter.admitted.cancelled():
                self._enter(waiter.caller, waiter.tokens)
                waiter.admitted.set_result(None)

    def _order(self, waiter: _Waiter) -> tuple[float, int]:
        return self._virtual_times[waiter.caller], waiter.arrival
