"""The limits that every request passes: the rate, the token budget, and the queue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from infer_align.config import Limits
from infer_align_server.limits.admission import Admission
from infer_align_server.limits.rate_limit import RateLimit, StoredRateLimit
from infer_align_server.limits.storage import LimitStorage, open_storage
from infer_align_server.sharing import Sharing


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """The limits of one server process.

    Attributes:
        requests: The requests per minute of each caller.
        tokens: The candidate tokens per minute of each caller.
        admission: What may run at once, and the queue in front of it.
        at_once: What may run and wait at once in this process.
        storage: The database in which all servers count; None if each counts alone.
    """

    requests: RateLimit
    tokens: RateLimit
    admission: Admission
    at_once: Limits
    storage: LimitStorage | None

    async def close(self) -> None:
        """Close the connections to the storage."""
        if self.storage is not None:
            await self.storage.close()


def make_caller_limits(
    limits: Limits, sharing: Sharing | None, on_failure: Callable[[], None]
) -> CallerLimits:
    """Return the limits of the configuration; workers share those of each caller.

    Args:
        limits: The configuration.
        sharing: What this process shares with the other workers; None if there are none.
        on_failure: Called for each count that the storage of all servers did not take.

    Raises:
        ConfigError: The storage cannot be used.
    """
    storage = open_storage(limits, on_failure)
    counts_alone = limits.storage_failure == "count_alone"

    def rate_limit(per_minute: int, unit: str, code: str) -> RateLimit:
        if per_minute == 0:
            return RateLimit(per_minute, unit, code)
        buckets = None if sharing is None else sharing.buckets(unit)
        if storage is None:
            return RateLimit(per_minute, unit, code, buckets=buckets)
        return StoredRateLimit(
            per_minute, unit, code, storage, counts_alone=counts_alone, buckets=buckets
        )

    at_once = sharing.limits(limits) if sharing else limits
    return CallerLimits(
        requests=rate_limit(limits.requests_per_minute, "requests", "rate_limit_exceeded"),
        tokens=rate_limit(
            limits.candidate_tokens_per_minute, "candidate tokens", "token_budget_exceeded"
        ),
        admission=Admission(at_once),
        at_once=at_once,
        storage=storage,
    )
