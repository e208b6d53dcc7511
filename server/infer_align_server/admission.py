"""Who may start, who waits, who is sent away: bounded by what each request can cost at worst."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic

from infer_align.config import Limits
from infer_align.errors import DeadlineExceeded, Overloaded

# How much a finished request's duration moves the estimate behind Retry-After.
SMOOTHING = 0.1
MAX_CALLERS = 10_000


@dataclass(slots=True)
class _Waiter:
    tokens: int
    admitted: asyncio.Future[None]


class Admission:
    """First come, first served, within `[limits]` max_running and max_running_tokens."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._waiting: deque[_Waiter] = deque()
        self._seconds = 1.0  # a request's usual duration
        self.running = 0
        self.running_tokens = 0

    @property
    def queued(self) -> int:
        """Requests waiting for their turn."""
        return len(self._waiting)

    @asynccontextmanager
    async def admit(self, tokens: int, deadline_seconds: float | None = None) -> AsyncIterator[None]:
        """Hold a place while the block runs; `tokens` is the request's worst case.

        Raises:
            Overloaded: the queue is full.
            DeadlineExceeded: the turn did not come in time.
        """
        if self._waiting or not self._fits(tokens):
            await self._queue(tokens, deadline_seconds)
        else:
            self._enter(tokens)
        started = monotonic()
        try:
            yield
        finally:
            self._seconds += SMOOTHING * (monotonic() - started - self._seconds)
            self.running -= 1
            self.running_tokens -= tokens
            self._wake()

    async def _queue(self, tokens: int, deadline_seconds: float | None) -> None:
        if len(self._waiting) >= self._limits.max_queue:
            turns = (len(self._waiting) + 1) / self._limits.max_running
            raise Overloaded(
                f"{self.running} requests are running and {len(self._waiting)} are waiting: the limit; try again later.",
                retry_after=max(1.0, turns * self._seconds),
                code="queue_full",
            )
        waiter = _Waiter(tokens, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(deadline_seconds):
                await waiter.admitted
        except BaseException as error:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif waiter.admitted.done() and not waiter.admitted.cancelled():  # its turn came as it left: pass it on
                self.running -= 1
                self.running_tokens -= tokens
            self._wake()
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded(f"no place came free within the {deadline_seconds} s allowed; allow more time.") from None
            raise

    def _fits(self, tokens: int) -> bool:
        if self.running == 0:
            return True  # alone, a request is bounded by its own limit
        return self.running < self._limits.max_running and self.running_tokens + tokens <= self._limits.max_running_tokens

    def _enter(self, tokens: int) -> None:
        self.running += 1
        self.running_tokens += tokens

    def _wake(self) -> None:
        while self._waiting and self._fits(self._waiting[0].tokens):
            waiter = self._waiting.popleft()
            if not waiter.admitted.cancelled():  # its client may have left in this very step
                self._enter(waiter.tokens)
                waiter.admitted.set_result(None)


class RateLimit:
    """A token bucket per caller: `requests_per_minute` on average, as many at once."""

    def __init__(self, requests_per_minute: int, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._rate = requests_per_minute / 60
        self._size = float(requests_per_minute)
        self._buckets: dict[str, tuple[float, float]] = {}  # caller -> (left, when)

    def take(self, caller: str) -> None:
        """Count one request.

        Raises:
            Overloaded: with the seconds until the next one is allowed.
        """
        if not self._rate:
            return
        now = self._clock()
        left, then = self._buckets.get(caller, (self._size, now))
        left = min(self._size, left + (now - then) * self._rate)
        if left < 1:
            raise Overloaded(
                f"over {self._size:.0f} requests per minute; wait before the next one.",
                retry_after=(1 - left) / self._rate,
                code="rate_limit_exceeded",
            )
        self._buckets[caller] = (left - 1, now)
        if len(self._buckets) > MAX_CALLERS:  # a bucket that has filled up again says nothing
            self._buckets = {who: (n, t) for who, (n, t) in self._buckets.items() if n + (now - t) * self._rate < self._size}
