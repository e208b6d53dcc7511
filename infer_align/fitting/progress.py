"""Estimate the remaining time of repeated work, for lines of progress."""

from __future__ import annotations

from time import monotonic

SECONDS_PER_MINUTE = 60
# Times from this on are given in minutes.
LONG = 100


class Pace:
    """Count pieces of work and estimate the time of the remaining ones from the finished ones."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self._started = monotonic()

    def add(self, count: int = 1) -> None:
        """Count finished pieces of work."""
        self.done += count

    def __str__(self) -> str:
        """Return a clause such as ", about 3 min to go"; "" if nothing remains or is measured."""
        remaining = self.total - self.done
        if remaining <= 0 or not self.done:
            return ""
        seconds = (monotonic() - self._started) / self.done * remaining
        return f", about {format_seconds(seconds)} to go"


def format_seconds(seconds: float) -> str:
    """Return a time for people, such as "40 s" or "3 min"."""
    if seconds < LONG:
        return f"{seconds:.0f} s"
    return f"{seconds / SECONDS_PER_MINUTE:.0f} min"
