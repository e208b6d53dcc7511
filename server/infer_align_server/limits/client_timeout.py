"""The client's timeout, which OpenAI's SDKs send in a header.

A request that is answered later than this has no reader. The timeout therefore becomes its
deadline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from infer_align.errors import DeadlineExceeded
from infer_align.flow.plan import Plan

# The Python SDK sends the first: the seconds it waits for any byte. The JavaScript SDK sends the
# second: the seconds it waits for the response's headers.
HEADERS = ("x-stainless-read-timeout", "x-stainless-timeout")
# The part of the timeout that is reserved for the way back to the client.
RESERVED_SHARE = 0.1
MAX_RESERVED_SECONDS = 2.0


def client_timeout(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that the client waits; None if no header has a positive number."""
    timeouts = []
    for name in HEADERS:
        text = headers.get(name)
        if text is None:
            continue
        try:
            seconds = float(text)
        except ValueError:
            continue
        if 0 < seconds < math.inf:
            timeouts.append(seconds)
    return min(timeouts, default=None)


def shortly_before(timeout: float) -> float:
    """Return a client's timeout without the time that the way back takes, in seconds."""
    return timeout - min(RESERVED_SHARE * timeout, MAX_RESERVED_SECONDS)


def client_deadline(deadline_seconds: float | None, timeout: float | None) -> float | None:
    """Return the deadline of a request: its own, or else shortly before the client's timeout.

    Do not use this for streams: each chunk and each comment starts the client's clock again.

    Args:
        deadline_seconds: The deadline that the request itself sets; None for none.
        timeout: The client's timeout in seconds; None for none.
    """
    if timeout is None or deadline_seconds is not None:
        return deadline_seconds
    return shortly_before(timeout)


def shorten_deadline(plan: Plan, waited_seconds: float) -> Plan:
    """Return the plan with the rest of its deadline after the time in the queue.

    Raises:
        DeadlineExceeded: The deadline has passed.
    """
    if plan.deadline_seconds is None:
        return plan
    remaining = plan.deadline_seconds - waited_seconds
    if remaining <= 0:
        raise DeadlineExceeded(
            f"The request was not admitted within its {plan.deadline_seconds:g} s; allow more time."
        )
    return replace(plan, deadline_seconds=remaining)
