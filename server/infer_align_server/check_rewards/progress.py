"""Print the progress of a long scoring as lines, which a log can hold too."""

from __future__ import annotations

from time import monotonic

from rich.console import Console
from rich.markup import escape

# Seconds between two lines about the same work.
INTERVAL = 5.0


class ProgressLines:
    """Prints how much of some work is done, and how long the rest will take.

    rich's bars redraw one line of a terminal; in a file or a pipe they leave nothing.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._title = ""
        self._start = 0.0
        self._printed = 0.0

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(escape(text), highlight=False, soft_wrap=True)

    def begin(self, title: str) -> None:
        """Begin a work."""
        self._title = title
        self._start = self._printed = monotonic()

    def advance(self, done: int, total: int, noun: str) -> None:
        """Print a line if the last one is some seconds old, or if the work is done.

        Args:
            done: number of units that are done, at least 1.
            total: number of all units.
            noun: the unit, in the plural.
        """
        now = monotonic()
        if done < total and now - self._printed < INTERVAL:
            return
        self._printed = now
        line = f"{self._title}: {done} of {total} {noun}"
        seconds = (now - self._start) * (total - done) / done
        if done < total:
            line += f", about {_duration(seconds)} to go"
        self.say(line)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
