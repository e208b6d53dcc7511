"""Draw the candidates of a plan: run its draws side by side, and end them at the deadline."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from time import monotonic

from infer_align.engines import Engine, Stream
from infer_align.errors import DeadlineExceeded, EngineFailed
from infer_align.flow.clock import Clock, loop_time
from infer_align.flow.observe import Observation
from infer_align.flow.plan import Plan
from infer_align.types import Candidate, Delta, Draw, Event

OnDelta = Callable[[Delta], None]
OnFinished = Callable[[Candidate], None]

# At a deadline the stream is stopped. The engine may take this long to return the partial
# candidates.
GRACE_SECONDS = 1.0
# Do not stream for longer deadlines: streaming costs more than a rarely needed partial answer is
# worth.
STREAMING_DEADLINE_SECONDS = 300.0


async def propose(
    plan: Plan,
    engine: Engine,
    clock: Clock,
    on_delta: OnDelta | None,
    on_finished: OnFinished,
) -> tuple[Candidate, ...]:
    """Draw the candidates of all draws, numbered over all draws.

    Args:
        plan: the plan.
        engine: started.
        clock: at its `draw_deadline` the candidates that still run are interrupted.
        on_delta: called with each piece of a candidate as it is sampled.
        on_finished: called with each candidate that is finished and not rejected.

    Raises:
        EngineFailed: every candidate failed.
        DeadlineExceeded: the deadline passed before any token.
    """
    observation = Observation(plan)
    candidate_draws = []
    first = 0
    for i, draw in enumerate(plan.draws):
        candidate_draws.append(
            CandidateDraw(i, draw, first, clock.draw_deadline, observation, on_delta, on_finished)
        )
        first += draw.n
    batches = await _run_together(candidate_draws, engine)
    candidates = [observation.mark(candidate) for batch in batches for candidate in batch]
    _check_any_usable(candidates, plan)
    return tuple(candidates)


async def _run_together(draws: Sequence[CandidateDraw], engine: Engine) -> list[list[Candidate]]:
    if len(draws) == 1:
        return [await draws[0].run(engine)]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(draw.run(engine)) for draw in draws]
    except ExceptionGroup as failures:
        # One draw was refused and the others are cancelled: raise as if it were the only draw.
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _check_any_usable(candidates: Sequence[Candidate], plan: Plan) -> None:
    if any(_is_usable(candidate) for candidate in candidates):
        return
    for candidate in candidates:
        if candidate.error is not None and not candidate.interrupted:
            several = f"all {len(candidates)} candidates failed; first: "
            raise EngineFailed(
                f"{several if len(candidates) > 1 else ''}{candidate.error}",
                status=candidate.status,
                retry_after=candidate.retry_after,
            )
    raise DeadlineExceeded(
        f"no candidate had produced anything after {plan.deadline_seconds:.3g} s; allow more time."
    )


def _is_usable(candidate: Candidate) -> bool:
    """Return True if the candidate is eligible, and not cut before its first token."""
    is_empty = candidate.interrupted and not candidate.completion_tokens
    return candidate.eligible and not is_empty


@dataclass(frozen=True, slots=True)
class CandidateDraw:
    """One draw of a plan while it runs."""

    index: int  # of the draw in the plan
    draw: Draw
    first: int  # number of the draw's first candidate over all draws
    deadline: float | None  # monotonic seconds
    observation: Observation
    on_delta: OnDelta | None
    on_finished: OnFinished

    async def run(self, engine: Engine) -> list[Candidate]:
        """Sample the draw and return its candidates, failed ones included."""
        finished: dict[int, Candidate] = {}
        async with engine.sample(self._prepared_draw()) as stream:
            for i in range(self.draw.n):
                self.observation.start(self.first + i, functools.partial(stream.stop, i))
            # The deadline stops a stream, so the stream is opened first. Opening it does not wait.
            async with self._stopped_at_deadline(stream):
                async for event in stream:
                    self._handle(event, finished)
        return [finished.get(i) or self._unfinished(i) for i in range(self.draw.n)]

    def _prepared_draw(self) -> Draw:
        has_deadline = (
            self.deadline is not None and self.deadline - monotonic() < STREAMING_DEADLINE_SECONDS
        )
        deltas = self.draw.deltas or self.on_delta is not None
        return replace(self.draw, deltas=deltas, has_deadline=has_deadline)

    @asynccontextmanager
    async def _stopped_at_deadline(self, stream: Stream) -> AsyncIterator[None]:
        """Stop the stream at the deadline, and leave it if it does not stop in time."""
        if self.deadline is None:
            yield
            return
        alarm = asyncio.get_running_loop().call_at(loop_time(self.deadline), stream.stop)
        try:
            async with asyncio.timeout_at(loop_time(self.deadline) + GRACE_SECONDS):
                yield
        except TimeoutError:
            # The candidates that are missing are filled in as failed.
            pass
        finally:
            alarm.cancel()

    def _handle(self, event: Event, finished: dict[int, Candidate]) -> None:
        index = self.first + event.index
        if isinstance(event, Candidate):
            candidate = replace(event, draw=self.index, index=index)
            finished[event.index] = candidate
            self.observation.notify(candidate)
            if not self.observation.is_rejected(index):
                self.on_finished(candidate)
            return
        if self.observation.is_active:
            self.observation.notify(replace(event, index=index))
        if isinstance(event, Delta) and self.on_delta is not None:
            self.on_delta(event)

    def _unfinished(self, i: int) -> Candidate:
        return Candidate(
            self.first + i, {}, self.index, error="the deadline passed", interrupted=True
        )
