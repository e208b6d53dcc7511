"""Let the observers of a plan follow its running candidates and reject some of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from infer_align.flow.plan import Plan
from infer_align.types import Candidate, Event


class Observation:
    """The observers of one batch, and the candidates that they rejected.

    Candidates are numbered over all batches of the plan; observers number those of the batch.
    """

    def __init__(self, plan: Plan, candidates: int, first: int = 0) -> None:
        """Observe a batch of `candidates`, the first of which has the number `first`."""
        self._first = first
        self._observers = [make(candidates, plan.n_returned) for make in plan.observers]
        self._stops: dict[int, Callable[[], None]] = {}
        self._rejections: dict[int, str] = {}

    def start(self, index: int, stop: Callable[[], None]) -> None:
        """Register a candidate that is being drawn; `stop` ends it."""
        self._stops[index] = stop

    def notify(self, event: Event) -> None:
        """Pass an event to the observers, and stop the candidates that they reject."""
        if isinstance(event, Candidate):
            self._stops.pop(event.index, None)
        if not self._observers:
            return
        in_batch = replace(event, index=event.index - self._first)
        for observer in self._observers:
            for index, reason in observer.observe(in_batch).items():
                number = self._first + index
                self._rejections.setdefault(number, reason)
                stop = self._stops.pop(number, None)
                if stop is not None:
                    stop()

    @property
    def is_active(self) -> bool:
        """Return True if the plan has observers."""
        return bool(self._observers)

    def is_rejected(self, index: int) -> bool:
        """Return True if some observer has rejected the candidate."""
        return index in self._rejections

    def mark(self, candidate: Candidate) -> Candidate:
        """Return the candidate with the reason for its rejection, if it was rejected."""
        reason = self._rejections.get(candidate.index)
        return candidate if reason is None else replace(candidate, rejected=reason)
