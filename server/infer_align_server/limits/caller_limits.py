"""The limits that every request passes: the rate, the token budget, and the queue."""

from __future__ import annotations

from dataclasses import dataclass

from infer_align.config import Limits
from infer_align_server.limits.admission import Admission
from infer_align_server.limits.rate_limit import RateLimit
from infer_align_server.sharing import Sharing


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """The limits of one server process.

    Attributes:
        requests: The requests per minute of each caller.
        tokens: The candidate tokens per minute of each caller.
        admission: What may run at once, and the queue in front of it.
    """

    requests: RateLimit
    tokens: RateLimit
    admission: Admission


def make_caller_limits(limits: Limits, sharing: Sharing | None) -> CallerLimits:
    """Return the limits of the configuration; workers share those of each caller."""

    def rate_limit(per_minute: int, unit: str, code: str) -> RateLimit:
        if sharing is None or per_minute == 0:
            return RateLimit(per_minute, unit, code)
        return RateLimit(per_minute, unit, code, buckets=sharing.buckets(unit))

    return CallerLimits(
        requests=rate_limit(limits.requests_per_minute, "requests", "rate_limit_exceeded"),
        tokens=rate_limit(
            limits.candidate_tokens_per_minute, "candidate tokens", "token_budget_exceeded"
        ),
        admission=Admission(sharing.limits(limits) if sharing else limits),
    )
