"""The flow: a plan's draws are sampled, scored and ranked. The only place that awaits an engine and rewards together.

Request ─ plan ─▶ Plan ─ engine ─▶ Candidates ─ rewards ─▶ Scores ─ objective ─▶ Selection ─▶ Response
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import monotonic
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from infer_align.engines import Engine
from infer_align.errors import AlignError, DeadlineExceeded, EngineFailed, RewardFailed
from infer_align.flow.observe import Halving
from infer_align.flow.request import plan_rewards
from infer_align.flow.selection import select
from infer_align.objectives import project
from infer_align.rewards import Reward, RewardScores, time_budget
from infer_align.types import (
    Array,
    Candidate,
    Delta,
    Direction,
    Draw,
    Estimate,
    Messages,
    Plan,
    Response,
    Scores,
    ScoringUsage,
    Timing,
)

OnDelta = Callable[[Delta], None]
OnFinished = Callable[[Candidate], None]
Early: TypeAlias = Mapping[
    str, Mapping[int, asyncio.Task[RewardScores]]
]  # reward -> candidate -> its marks on their way

# After a deadline an engine is asked to finish with what it has; this long it may take to say so.
GRACE_SECONDS = 1.0
# Of a deadline, the share that is kept for scoring: candidates that nobody could compare are worth little.
SCORING_SHARE = 0.2
# A timer may ring this many seconds early; what it ended was ended by the deadline all the same.
TIMER_SLACK = 0.05
# A deadline further away than this is not worth the price of receiving every token by itself: what it cuts has no partial text.
PATIENCE_SECONDS = 300.0


async def align(
    plan: Plan, engine: Engine, rewards: Mapping[str, Reward], on_delta: OnDelta | None = None
) -> Response:
    """Carry out a plan.

    Args:
        plan: from `infer_align.flow.request.make_plan`.
        engine: started.
        rewards: by name; must hold every reward the plan names.
        on_delta: called with each piece of a candidate as it is sampled, in this event loop.

    Raises:
        EngineFailed: every candidate failed.
        RewardFailed: there were several candidates to compare and none could be scored.
        DeadlineExceeded: the deadline passed before any token.
    """
    started = monotonic()
    deadline = started + plan.deadline_seconds if plan.deadline_seconds else None
    last_draw = deadline and deadline - (
        SCORING_SHARE * (deadline - started) if plan.rewards else 0.0
    )

    early = _Early(plan, rewards, deadline)
    try:
        candidates = await propose(plan, engine, on_delta, last_draw, early.put)
        generated = monotonic()
        scores = await score(plan, rewards, candidates, deadline, early.marks)
    finally:
        early.cancel()
    partial = any(candidate.interrupted and candidate.rejected is None for candidate in candidates)
    selection = select(plan, candidates, scores)
    if not selection.ranking:
        late = deadline is not None and monotonic() >= deadline - TIMER_SLACK
        first = next(iter(selection.dropped.values()))
        if plan.candidates > 1 and not late:
            raise RewardFailed(f"{selection.reason}; first: {first}")
        why = (
            "the deadline passed before scoring: the first candidate drawn"
            if late
            else f"nothing to compare; {first}"
        )
        selection = replace(
            selection, ranking=tuple(c.index for c in candidates if c.eligible), reason=why
        )
        partial = partial or late

    ended = monotonic()
    timing = Timing(generated - started, ended - generated, ended - started)
    return Response(plan, candidates, scores, selection, timing, partial)


async def propose(
    plan: Plan,
    engine: Engine,
    on_delta: OnDelta | None = None,
    deadline: float | None = None,
    on_finished: OnFinished = lambda _: None,
) -> tuple[Candidate, ...]:
    """All candidates of all draws, numbered through; at `deadline` (monotonic seconds) those still running are cut."""
    firsts = [sum(draw.n for draw in plan.draws[:i]) for i in range(len(plan.draws))]
    halving = Halving(plan.candidates, plan.survival, plan.keep)
    drawing = [
        _sample(engine, draw, i, firsts[i], halving, on_delta, deadline, on_finished)
        for i, draw in enumerate(plan.draws)
    ]
    if len(drawing) == 1:
        drawn = [await drawing[0]]
    else:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(sampling) for sampling in drawing]
        except (
            ExceptionGroup
        ) as failures:  # one draw was refused, the others are cancelled: say it as if it were alone
            raise failures.exceptions[0] from None
        drawn = [task.result() for task in tasks]
    candidates = tuple(
        replace(c, rejected=halving.rejected.get(c.index)) for batch in drawn for c in batch
    )
    if all(not c.eligible or (c.interrupted and not c.completion_tokens) for c in candidates):
        first = next((c for c in candidates if c.error is not None and not c.interrupted), None)
        if first is None:
            raise DeadlineExceeded(
                f"no candidate had produced anything after {plan.deadline_seconds:.3g} s; allow more time."
            )
        all_of_them = (
            f"all {len(candidates)} candidates failed; first: " if len(candidates) > 1 else ""
        )
        raise EngineFailed(
            f"{all_of_them}{first.error}", status=first.status, retry_after=first.retry_after
        )
    return candidates


async def _sample(
    engine: Engine,
    draw: Draw,
    i: int,
    first: int,
    halving: Halving,
    on_delta: OnDelta | None,
    deadline: float | None,
    on_finished: OnFinished,
) -> list[Candidate]:
    """The candidates of draw `i`, numbered from `first`."""
    loop = asyncio.get_running_loop()
    finished: dict[int, Candidate] = {}
    has_deadline = deadline is not None and deadline - monotonic() < PATIENCE_SECONDS
    draw = replace(draw, deltas=on_delta is not None, has_deadline=has_deadline)
    async with engine.sample(draw) as stream:
        alarm = None if deadline is None else loop.call_at(_loop_time(deadline), stream.stop)
        for j in range(draw.n):
            halving.joins(first + j, functools.partial(stream.stop, j))
        try:
            async with asyncio.timeout_at(
                None if deadline is None else _loop_time(deadline) + GRACE_SECONDS
            ):
                async for event in stream:
                    if isinstance(event, Candidate):
                        finished[event.index] = replace(event, draw=i, index=first + event.index)
                        halving.ended(first + event.index)
                        if first + event.index not in halving.rejected:
                            on_finished(finished[event.index])
                    elif isinstance(event, Estimate):
                        halving.estimated(first + event.index, event.tokens, event.value)
                    elif on_delta is not None:
                        on_delta(event)
        except TimeoutError:
            pass  # what is missing is filled in below
        finally:
            if alarm:
                alarm.cancel()
    return [
        finished.get(j)
        or Candidate(first + j, {}, i, error="the deadline passed", interrupted=True)
        for j in range(draw.n)
    ]


class _Early:
    """What pipelined rewards say of each candidate, asked as soon as it is finished: others are still being drawn."""

    def __init__(self, plan: Plan, rewards: Mapping[str, Reward], deadline: float | None) -> None:
        self._rewards, self._messages, self._deadline = (
            plan_rewards(plan, rewards),
            plan.messages,
            deadline,
        )
        self.marks: dict[str, dict[int, asyncio.Task[RewardScores]]] = {
            name: {} for name, r in self._rewards.items() if r.pipelined
        }

    def put(self, candidate: Candidate) -> None:
        """A candidate is finished."""
        if candidate.error is None:
            for name, tasks in self.marks.items():
                mark = _mark(self._rewards[name], self._messages, [candidate], self._deadline)
                tasks[candidate.index] = asyncio.get_running_loop().create_task(mark)

    def cancel(self) -> None:
        """Nobody waits any more."""
        for tasks in self.marks.values():
            for task in tasks.values():
                task.cancel()


async def score(
    plan: Plan,
    rewards: Mapping[str, Reward],
    candidates: Sequence[Candidate],
    deadline: float | None = None,
    early: Early = MappingProxyType({}),
) -> Scores:
    """Every reward of the plan over the candidates that did not fail, all at once. What fails or is late is NaN."""
    if not plan.rewards:
        return Scores()
    alive = [c for c in candidates if c.eligible]
    asked = plan_rewards(plan, rewards)
    found = (
        _joined([early[name][c.index] for c in alive])
        if name in early
        else _mark(reward, plan.messages, alive, deadline)
        for name, reward in asked.items()
    )
    marks = dict(zip(asked, await asyncio.gather(*found), strict=True))
    members, notes = {}, {}
    for name in plan.rewards:
        base, _, attribute = name.partition(".")
        reward, mark = asked[base], marks[base]
        members[name] = np.full((len(reward.members), len(candidates)), np.nan)
        members[name][:, [c.index for c in alive]] = _objective(
            reward, mark.values, attribute, plan.direction
        )
        told = dict(zip((c.index for c in alive), mark.notes, strict=False))
        notes[name] = tuple(told.get(i) for i in range(len(candidates)))
    reports = {name: mark.report for name, mark in marks.items() if mark.report}
    return Scores(
        members, sum((mark.spent for mark in marks.values()), ScoringUsage()), notes, reports
    )


def _objective(reward: Reward, values: Array, attribute: str, direction: Direction | None) -> Array:
    """[A, K, N] -> [K, N]: one attribute, the only score there is, or the projection on the plan's direction."""
    if attribute:
        return np.asarray(values[reward.attributes.index(attribute)])
    return (
        project(direction, values, reward.attributes)
        if reward.attributes and direction
        else np.asarray(values[0])
    )


async def _joined(tasks: Sequence[asyncio.Task[RewardScores]]) -> RewardScores:
    """The marks of several candidates from those of each."""
    marks = await asyncio.gather(*tasks)
    values = np.concatenate([mark.values for mark in marks], axis=-1)
    spent = sum((mark.spent for mark in marks), ScoringUsage())
    return RewardScores(
        values, spent, tuple(note for mark in marks for note in mark.notes or (None,))
    )


async def _mark(
    reward: Reward, messages: Messages, candidates: Sequence[Candidate], deadline: float | None
) -> RewardScores:
    shape = (max(1, len(reward.attributes)), len(reward.members), len(candidates))
    seconds = (
        reward.timeout_seconds
        if deadline is None
        else min(reward.timeout_seconds, deadline - monotonic())
    )
    time_budget.set(seconds)  # of this task alone
    try:
        async with asyncio.timeout(seconds):
            marks = await reward.score(messages, candidates)
        if marks.values.shape != shape:
            raise ValueError(f"the reward returned shape {marks.values.shape}, expected {shape}")
        return replace(
            marks, values=np.where(np.isfinite(marks.values), marks.values, np.nan)
        )  # infinity compares nothing
    except TimeoutError:
        why = f"no score within {max(0.0, seconds):.3g} s"
    except AlignError as error:
        why = error.message
    except (
        Exception
    ) as error:  # a reward is the user's code: whatever it raises is data, not a crash
        why = f"{type(error).__name__}: {error}"
    return RewardScores(np.full(shape, np.nan), notes=(why,) * len(candidates))


def _loop_time(deadline: float) -> float:
    """`deadline`, monotonic seconds, on the event loop's own clock."""
    return asyncio.get_running_loop().time() + (deadline - monotonic())
