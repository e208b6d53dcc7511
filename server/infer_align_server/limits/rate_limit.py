"""Rate limits: how much of a unit each caller may use per minute."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import TypeAlias

from infer_align.errors import Overloaded, Unavailable
from infer_align_server.limits.buckets import Bucket, Buckets, MemoryBuckets
from infer_align_server.limits.storage import Key, LimitStorage, Refill, StorageFailed

log = logging.getLogger("infer_align")

# Relative tolerance for rounding errors, so that waiting exactly `retry_after` is enough.
ROUNDING = 1e-9


# Gives back units that were reserved and not used; takes more if the number is negative.
GiveBack: TypeAlias = Callable[[int], None]


class RateLimit:
    """A token bucket per caller.

    A bucket holds at most `per_minute` units and fills at `per_minute` units per minute. The
    packages `limits` and `aiolimiter` do not fit: they allow no amount above the size of the
    bucket, and no refund of unused units.

    Args:
        per_minute: The size of a bucket; 0 for no limit.
        unit: The name of the unit in error messages.
        code: The `code` of the error.
        clock: A function that returns seconds.
        buckets: The buckets of all callers; None for buckets of this process alone.
    """

    def __init__(
        self,
        per_minute: int,
        unit: str,
        code: str,
        clock: Callable[[], float] = monotonic,
        buckets: Buckets | None = None,
    ) -> None:
        self._size = float(per_minute)
        self._per_second = per_minute / 60
        self._unit = unit
        self._code = code
        self._clock = clock
        self._buckets = MemoryBuckets() if buckets is None else buckets

    @property
    def limited(self) -> bool:
        """Return True if there is a limit."""
        return self._per_second > 0

    def available(self, caller: str) -> float:
        """Return the units that a caller may use now.

        It is negative after the caller used more than a full bucket.
        """
        bucket = self._buckets.get(caller)
        if bucket is None:
            return self._size
        refilled = (self._clock() - bucket.time) * self._per_second
        return min(self._size, bucket.amount + refilled)

    def take(self, caller: str, amount: int = 1) -> None:
        """Take units from a caller's bucket.

        An amount larger than the bucket is allowed when the bucket is full. The bucket is then
        below zero.

        Raises:
            Overloaded: The bucket does not hold the amount. `retry_after` are the seconds until
                it does, if the caller uses and returns nothing else.
        """
        if not self.limited:
            return
        required = min(float(amount), self._size)
        with self._buckets.exclusive():
            available = self.available(caller)
            if available < required - ROUNDING * self._size:
                raise self._over_limit(amount, available, required)
            self._set(caller, available - amount)

    async def reserve(self, caller: str, amount: int = 1) -> GiveBack:
        """Take units from a caller's bucket; return the function that gives back unused ones.

        Raises:
            Overloaded: See `take`.
        """
        self.take(caller, amount)
        return partial(self.give_back, caller)

    def give_back(self, caller: str, amount: int) -> None:
        """Return units that were taken and not used; take more if `amount` is negative."""
        if not self.limited or not amount:
            return
        try:
            with self._buckets.exclusive():
                self._set(caller, min(self._size, self.available(caller) + amount))
        except Unavailable as error:
            # The request is answered already. The bucket fills again within a minute.
            log.error("%s: %d %s are not given back", error.message, amount, self._unit)

    def _over_limit(self, amount: int, available: float, required: float) -> Overloaded:
        seconds = (required - available) / self._per_second
        wait = f"Wait {max(1, math.ceil(seconds))} s before the next request"
        message = f"The limit is {self._size:.0f} {self._unit} per minute and caller."
        if amount == 1:
            message += f" {wait}."
        else:
            rest = max(0, int(available))
            message += f" This request may need {amount}; {rest} are available now. {wait}, or "
            message += "make it smaller: fewer candidates, or a lower max_tokens."
        return Overloaded(message, retry_after=seconds, code=self._code)

    def _set(self, caller: str, amount: float) -> None:
        now = self._clock()
        self._buckets.set(caller, Bucket(amount, now))
        self._buckets.sweep(self._size, self._per_second, now)


class StoredRateLimit(RateLimit):
    """A rate limit that servers on several machines count together.

    Args:
        per_minute: See `RateLimit`.
        unit: See `RateLimit`.
        code: See `RateLimit`.
        storage: The buckets of all servers.
        counts_alone: While the storage does not answer, count in this process; else refuse.
        buckets: The buckets of this process, or of the workers of one server.
    """

    def __init__(
        self,
        per_minute: int,
        unit: str,
        code: str,
        storage: LimitStorage,
        *,
        counts_alone: bool,
        buckets: Buckets | None = None,
    ) -> None:
        super().__init__(per_minute, unit, code, buckets=buckets)
        self._storage = storage
        self._counts_alone = counts_alone
        self._rate = Refill(self._size, self._per_second)

    async def reserve(self, caller: str, amount: int = 1) -> GiveBack:
        """Take units from a caller's bucket; return the function that gives back unused ones.

        Raises:
            Overloaded: See `take`.
            StorageFailed: The storage does not answer, and this process must not count alone.
        """
        required = min(float(amount), self._size)
        tolerated = required - ROUNDING * self._size
        key = Key(self._unit, caller)
        try:
            available = await self._storage.take(key, self._rate, amount, tolerated)
        except StorageFailed:
            if not self._counts_alone:
                raise
            return await super().reserve(caller, amount)
        if available is not None:
            raise self._over_limit(amount, available, required)

        def give_back(unused: int) -> None:
            if unused:
                self._storage.give_back(key, self._rate, unused)

        return give_back
