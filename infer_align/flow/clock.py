"""Measure one request, and compute the deadlines of its stages."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from infer_align.flow.response import Timing

# The share of a deadline reserved for scoring: candidates that were not compared are worth little.
SCORING_SHARE = 0.2
# An event loop's timer may fire this many seconds early. What it ends, the deadline ended.
TIMER_SLACK_SECONDS = 0.05


class Clock:
    """The start of a request and its deadlines, in seconds of the monotonic clock.

    Attributes:
        deadline: when the answer must be ready, or None.
        draw_deadline: when drawing must end, or None.
    """

    def __init__(self, deadline_seconds: float | None, *, scores: bool) -> None:
        """Start now; `scores` reserves a share of the deadline for scoring."""
        self._started = monotonic()
        self._generate_seconds = 0.0
        self.deadline: float | None = None
        self.draw_deadline: float | None = None
        if deadline_seconds:
            reserved = SCORING_SHARE * deadline_seconds if scores else 0.0
            self.deadline = self._started + deadline_seconds
            self.draw_deadline = self.deadline - reserved

    @property
    def late(self) -> bool:
        """Return True if the deadline has passed."""
        return self.deadline is not None and monotonic() >= self.deadline - TIMER_SLACK_SECONDS

    @property
    def drawing_is_late(self) -> bool:
        """Return True if the deadline of drawing has passed."""
        if self.draw_deadline is None:
            return False
        return monotonic() >= self.draw_deadline - TIMER_SLACK_SECONDS

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Count the seconds of the block as those of drawing a batch of candidates."""
        started = monotonic()
        yield
        self._generate_seconds += monotonic() - started

    def timing(self) -> Timing:
        """Return the seconds of the stages, up to now. What is not drawing is scoring."""
        total = monotonic() - self._started
        return Timing(self._generate_seconds, total - self._generate_seconds, total)


def loop_time(deadline: float) -> float:
    """Convert a deadline from the monotonic clock to the clock of the running event loop."""
    return asyncio.get_running_loop().time() + (deadline - monotonic())
