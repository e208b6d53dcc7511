"""The events of a step, on their way from the scheduler's thread to the callers' event loops."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from infer_align.engines.transformers.rows import Job
from infer_align.errors import AlignError, EngineFailed
from infer_align.types import Candidate, Event

log = logging.getLogger("infer_align")

Delivery = tuple[Job, Event | AlignError]


class Outbox:
    """Collects the events of a step and delivers them with one call per event loop."""

    def __init__(self) -> None:
        self._pending: list[Delivery] = []

    def add(self, job: Job, events: Iterable[Event]) -> None:
        """Append events of a job; each candidate counts as finished."""
        for event in events:
            self._pending.append((job, event))
            if isinstance(event, Candidate):
                job.unfinished -= 1

    def fail(self, jobs: Iterable[Job], error: AlignError) -> None:
        """End jobs with an error. The next step drops what belongs to them."""
        for job in jobs:
            if job.unfinished:
                self._pending.append((job, error))
            job.closed = True

    @contextmanager
    def failing(self, jobs: Iterable[Job]) -> Iterator[None]:
        """Run a part of a step. If it fails, it ends these jobs, not the engine."""
        involved = set(jobs)
        try:
            yield
        # The model's code may raise anything.
        except Exception as error:
            log.exception("a step failed")
            self.fail(involved, EngineFailed(f"the engine failed: {error}", status=500))

    def publish(self) -> None:
        """Deliver the events to their event loops."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
        for delivery in self._pending:
            by_loop.setdefault(delivery[0].loop, []).append(delivery)
        self._pending = []
        for loop, deliveries in by_loop.items():
            # A closed loop raises RuntimeError; then no caller reads the stream.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_deliver, deliveries)


def _deliver(deliveries: Sequence[Delivery]) -> None:
    for job, event in deliveries:
        job.stream.put(event)
