"""What one caller may use in a minute: requests, and candidate tokens by their worst case until it is known better."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from infer_align.errors import Overloaded

MAX_CALLERS = 10_000
# A caller that waited as long as it was told is not sent away again over the last bit of a float.
ROUNDING = 1e-9


class RateLimit:
    """A token bucket per caller: `per_minute` of a unit on average, as many at once; 0 is no limit."""

    def __init__(
        self, per_minute: int, unit: str, code: str, clock: Callable[[], float] = monotonic
    ) -> None:
        self._size = float(per_minute)
        self._rate = per_minute / 60
        self._unit = unit
        self._code = code
        self._clock = clock
        self._buckets: dict[
            str, tuple[float, float]
        ] = {}  # caller -> (left, when); a caller without one has it full
        self._sweep_at = MAX_CALLERS

    @property
    def limited(self) -> bool:
        """Whether there is a limit at all."""
        return self._rate > 0

    def left(self, caller: str) -> float:
        """What the caller may use now; below 0 after something larger than a full bucket."""
        now = self._clock()
        left, then = self._buckets.get(caller, (self._size, now))
        return min(self._size, left + (now - then) * self._rate)

    def take(self, caller: str, amount: int = 1) -> None:
        """Use `amount`; more than a full bucket is allowed when it is full, and has to be earned back.

        Raises:
            Overloaded: with the seconds until it would be allowed, if nothing else is used or given back until then.
        """
        if not self._rate:
            return
        left, needed = self.left(caller), min(float(amount), self._size)
        if left < needed - ROUNDING * self._size:
            asked = (
                ""
                if amount == 1
                else f" This request may need {amount}, {max(0, int(left))} are left."
            )
            raise Overloaded(
                f"over {self._size:.0f} {self._unit} per minute.{asked} Wait before the next one, or ask for less.",
                retry_after=(needed - left) / self._rate,
                code=self._code,
            )
        self._set(caller, left - amount)

    def give_back(self, caller: str, amount: int) -> None:
        """Return what was taken and not used; below 0, take what was used beyond it."""
        if self._rate and amount:
            self._set(caller, min(self._size, self.left(caller) + amount))

    def _set(self, caller: str, left: float) -> None:
        self._buckets[caller] = (left, self._clock())
        if len(self._buckets) > self._sweep_at:  # a bucket that has filled up again says nothing
            self._buckets = {
                who: bucket for who, bucket in self._buckets.items() if self.left(who) < self._size
            }
            self._sweep_at = max(MAX_CALLERS, 2 * len(self._buckets))
