"""Planning with an engine that finds out its capabilities only when a request needs them.

Planning is a pure function and costs nothing. If it meets something that the engine does not know
yet, the engine finds it out, and the plan is made again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from infer_align.engines import Undiscovered

T = TypeVar("T")

# One request needs facts about a few things at most: its fields, its methods and its judges.
MAX_DISCOVERIES = 8


async def when_discovered(plan: Callable[[], T]) -> T:
    """Return `plan()`; find out first what it needs to know about an engine.

    Raises:
        Unavailable: it could not be found out.
    """
    for _ in range(MAX_DISCOVERIES):
        try:
            return plan()
        except Undiscovered as gap:
            await gap.discover()
    return plan()
