"""Successive halving of a plan's candidates: who is drawn on, from what value estimates say on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping


class Halving:
    """Who of N candidates goes on, from what their values expect on the way.

    Candidates are compared at a number of tokens when each of them has either got so far or ended before. What comes of it depends
    on the estimates alone, not on who was quick: a candidate that lost is given up even if it has ended since.

    Attributes:
        rejected: candidate -> why it was given up.
    """

    def __init__(self, candidates: int, survival: float, least: int) -> None:
        """`least` of them are drawn to the end in any case."""
        self.rejected: dict[int, str] = {}
        self._survival = survival
        self._least = least
        self._running = {*range(candidates)}
        self._compared = 0  # tokens
        self._reached: dict[int, dict[int, float]] = {}  # tokens -> candidate -> its value there
        self._stops: dict[int, Callable[[], None]] = {}

    def joins(self, index: int, stop: Callable[[], None]) -> None:
        """A candidate is being drawn; `stop` ends it."""
        self._stops[index] = stop

    def estimated(self, index: int, tokens: int, value: float) -> None:
        """A value has been seen; what is not a number neither wins nor loses.

        To four digits: answers that began alike are equal, whatever a batch of another size makes of the last ones.
        """
        if index not in self.rejected and tokens > self._compared:
            self._reached.setdefault(tokens, {})[index] = float(f"{value:.4g}")
            self._compare()

    def ended(self, index: int) -> None:
        """A candidate is finished, by itself or not."""
        self._running.discard(index)
        self._compare()

    def _compare(self) -> None:
        for tokens in sorted(self._reached):
            reached = self._reached[tokens]
            if not self._running <= reached.keys():
                return
            del self._reached[tokens]
            self._compared = tokens
            self._reject(
                tokens, {index: value for index, value in reached.items() if not math.isnan(value)}
            )

    def _reject(self, tokens: int, values: Mapping[int, float]) -> None:
        ranking = sorted(values, key=lambda index: (-values[index], index))
        kept = max(self._least, math.ceil(self._survival * len(ranking)))
        for index in ranking[kept:]:
            lead = f"estimate {values[index]:.3g}, below the best {kept} of {len(ranking)}"
            self.rejected[index] = f"stopped early: after {tokens} tokens, {lead}"
            for later in self._reached.values():
                later.pop(index, None)
            if index in self._running:
                self._running.discard(index)
                self._stops[index]()
