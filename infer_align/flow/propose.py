"""Draw a batch of candidates: run its draws side by side, and end them at the deadline."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from time import monotonic

from infer_align.engines import Engine, Stream
from infer_align.errors import AlignError, DeadlineExceeded, EngineFailed
from infer_align.flow.batches import CandidateBatch, Share
from infer_align.flow.clock import Clock, loop_time
from infer_align.flow.observe import Observation
from infer_align.flow.plan import Plan
from infer_align.flow.selection import NothingScored
from infer_align.stages import stage
from infer_align.types import Candidate, Delta, Draw, Event, Scores

OnDelta = Callable[[Delta], None]
OnFinished = Callable[[Candidate], None]

# At a deadline the stream is stopped. The engine may take this long to return the partial
# candidates.
GRACE_SECONDS = 1.0
# Do not stream for longer deadlines: streaming costs more than a rarely needed partial answer is
# worth.
STREAMING_DEADLINE_SECONDS = 300.0


def call_both(first: OnFinished, second: OnFinished | None) -> OnFinished:
    """Return a function that calls one function after the other; the second may be missing."""
    if second is None:
        return first

    def call(candidate: Candidate) -> None:
        first(candidate)
        second(candidate)

    return call


async def propose(
    batch: CandidateBatch,
    plan: Plan,
    engine: Engine,
    clock: Clock,
    on_delta: OnDelta | None,
    on_finished: OnFinished,
) -> tuple[Candidate, ...]:
    """Draw the candidates of a batch, numbered over all draws and batches.

    Args:
        batch: the batch of the plan.
        plan: the plan.
        engine: started.
        clock: at its `draw_deadline` the candidates that still run are interrupted.
        on_delta: called with each piece of a candidate as it is sampled.
        on_finished: called with each candidate that is finished and not rejected.

    Raises:
        EngineFailed: every candidate of the first batch failed. Later ones may.
        NothingScored: observers rejected every candidate of the first batch.
        DeadlineExceeded: the deadline passed before any token of the first batch.
    """
    observation = Observation(plan, batch.candidates, batch.first)
    candidate_draws = []
    for share in batch.shares:
        candidate_draws.append(
            CandidateDraw(share, clock.draw_deadline, observation, on_delta, on_finished)
        )
    with clock.drawing(), stage("draw"):
        drawn = await _run_batch(batch, candidate_draws, engine)
    candidates = [observation.mark(candidate) for candidate in drawn]
    if batch.first == 0:
        _check_any_usable(candidates, plan)
    return tuple(candidates)


async def _run_batch(
    batch: CandidateBatch, draws: Sequence[CandidateDraw], engine: Engine
) -> list[Candidate]:
    """Return the candidates of a batch. If a later batch fails, the earlier ones still count."""
    try:
        by_draw = await _run_together(draws, engine)
    except AlignError as error:
        if batch.first == 0:
            raise
        by_draw = [draw.failed(error) for draw in draws]
    return list(itertools.chain.from_iterable(by_draw))


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
    if all(candidate.rejected is not None for candidate in candidates):
        raise NothingScored(
            "no answer is left: every candidate was rejected while it ran; first: "
            f"{candidates[0].rejected}",
            candidates,
            Scores(),
        )
    # Only a deadline leaves candidates without an error and without a token.
    raise DeadlineExceeded(
        f"no candidate had produced anything after {plan.deadline_seconds:.3g} s; allow more time."
    )


def _is_usable(candidate: Candidate) -> bool:
    """Return True if the candidate is eligible, and not cut before its first token."""
    is_empty = candidate.interrupted and not candidate.completion_tokens
    return candidate.eligible and not is_empty


@dataclass(frozen=True, slots=True)
class CandidateDraw:
    """One draw of a batch while it runs."""

    share: Share
    deadline: float | None  # monotonic seconds
    observation: Observation
    on_delta: OnDelta | None
    on_finished: OnFinished

    async def run(self, engine: Engine) -> list[Candidate]:
        """Sample the draw and return its candidates, failed ones included."""
        finished: dict[int, Candidate] = {}
        async with engine.sample(self._prepared_draw()) as stream:
            for i in range(self.share.draw.n):
                self.observation.start(self.share.first + i, functools.partial(stream.stop, i))
            # The deadline stops a stream, so the stream is opened first. Opening it does not wait.
            async with self._stopped_at_deadline(stream):
                async for event in stream:
                    self._handle(event, finished)
        return [finished.get(i) or self._unfinished(i) for i in range(self.share.draw.n)]

    def failed(self, error: AlignError) -> list[Candidate]:
        """Return the candidates of a draw that could not be sampled."""
        numbers = range(self.share.first, self.share.first + self.share.draw.n)
        return [Candidate(i, {}, self.share.index, error=error.message) for i in numbers]

    def _prepared_draw(self) -> Draw:
        has_deadline = (
            self.deadline is not None and self.deadline - monotonic() < STREAMING_DEADLINE_SECONDS
        )
        draw = self.share.draw
        deltas = draw.deltas or self.on_delta is not None
        if deltas == draw.deltas and has_deadline == draw.has_deadline:
            return draw
        return replace(draw, deltas=deltas, has_deadline=has_deadline)

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
        if isinstance(event, Candidate):
            candidate = self._numbered(event)
            finished[event.index] = candidate
            self.observation.notify(candidate)
            if not self.observation.is_rejected(candidate.index):
                self.on_finished(candidate)
            return
        if self.observation.is_active:
            self.observation.notify(replace(event, index=self.share.first + event.index))
        if isinstance(event, Delta) and self.on_delta is not None:
            self.on_delta(event)

    def _numbered(self, candidate: Candidate) -> Candidate:
        """Return a candidate of this draw with the numbers that it has in the plan."""
        share = self.share
        if share.index == candidate.draw and share.first == 0:
            # One draw in one batch, the usual case: the engine's number is the plan's.
            return candidate
        return replace(candidate, draw=share.index, index=share.first + candidate.index)

    def _unfinished(self, i: int) -> Candidate:
        return Candidate(
            self.share.first + i,
            {},
            self.share.index,
            error="the deadline passed",
            interrupted=True,
        )
