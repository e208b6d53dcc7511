"""How long a client will wait, as OpenAI's SDKs say in a header: an answer after that is sampled for nobody."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from infer_align.types import Plan

# Python's SDK sends the first, the seconds it waits for any byte; JavaScript's the second, the seconds it waits for the head.
HEADERS = ("x-stainless-read-timeout", "x-stainless-timeout")
# Of what the client allows, this is kept for the way back.
SHARE, MOST_SECONDS = 0.1, 2.0


def client_timeout(headers: Mapping[str, str]) -> float | None:
    """Seconds until the client gives up; None where it does not say. What is no positive number says nothing."""
    given = []
    for name in HEADERS:
        try:
            seconds = float(headers.get(name, ""))
        except ValueError:
            continue
        if 0 < seconds < math.inf:
            given.append(seconds)
    return min(given, default=None)


def with_client_deadline(plan: Plan, patience: float | None) -> Plan:
    """The plan, due a little before the client gives up; a deadline that the request sets itself stands.

    Not for streams: there each piece, and each comment, starts the client's clock anew.
    """
    if patience is None or plan.deadline_seconds is not None:
        return plan
    return replace(plan, deadline_seconds=patience - min(SHARE * patience, MOST_SECONDS))
