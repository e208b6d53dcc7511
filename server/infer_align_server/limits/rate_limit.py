"""Rate limits: how much of a unit each caller may use per minute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from infer_align.errors import Overloaded

# Above this number of buckets, full ones are deleted.
MAX_CALLERS = 10_000
# Relative tolerance for rounding errors, so that waiting exactly `retry_after` is enough.
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class _Bucket:
    """The content of a token bucket at a time in seconds of the clock."""

    amount: float
    time: float


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
    """

    def __init__(
        self, per_minute: int, unit: str, code: str, clock: Callable[[], float] = monotonic
    ) -> None:
        self._size = float(per_minute)
        self._per_second = per_minute / 60
        self._unit = unit
        self._code = code
        self._clock = clock
        # A caller without a bucket has a full one.
        self._buckets: dict[str, _Bucket] = {}
        self._sweep_size = MAX_CALLERS

    @property
    def limited(self) -> bool:
        """True if there is a limit."""
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
        available = self.available(caller)
        required = min(float(amount), self._size)
        if available < required - ROUNDING * self._size:
            raise self._over_limit(amount, available, required)
        self._set(caller, available - amount)

    def give_back(self, caller: str, amount: int) -> None:
        """Return units that were taken and not used; take more if `amount` is negative."""
        if self.limited and amount:
            self._set(caller, min(self._size, self.available(caller) + amount))

    def _over_limit(self, amount: int, available: float, required: float) -> Overloaded:
        message = f"The limit is {self._size:.0f} {self._unit} per minute."
        if amount != 1:
            message += (
                f" This request may need {amount}; {max(0, int(available))} are available now."
            )
        return Overloaded(
            f"{message} Wait before the next request, or make it smaller.",
            retry_after=(required - available) / self._per_second,
            code=self._code,
        )

    def _set(self, caller: str, amount: float) -> None:
        self._buckets[caller] = _Bucket(amount, self._clock())
        if len(self._buckets) > self._sweep_size:
            self._delete_full_buckets()

    def _delete_full_buckets(self) -> None:
        self._buckets = {
            caller: bucket
            for caller, bucket in self._buckets.items()
            if self.available(caller) < self._size
        }
        self._sweep_size = max(MAX_CALLERS, 2 * len(self._buckets))
