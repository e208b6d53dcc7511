"""The flow: a plan's draws are sampled, scored and ranked. The only place that awaits an engine and rewards together.

Request ─ plan ─▶ Plan ─ engine ─▶ Candidates ─ rewards ─▶ Scores ─ objective ─▶ Selection ─▶ Response
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import monotonic

import numpy as np

from infer_align.engines import Engine
from infer_align.errors import AlignError, DeadlineExceeded, EngineFailed, RewardFailed
from infer_align.rewards import Marks, Messages, Reward
from infer_align.selection import select
from infer_align.types import Candidate, Delta, Draw, Plan, Response, Scores, Timing

OnDelta = Callable[[Delta], None]

# After a deadline an engine is asked to finish with what it has; this long it may take to say so.
GRACE_SECONDS = 1.0
# Of a deadline, the share that is kept for scoring: candidates that nobody could compare are worth little.
SCORING_SHARE = 0.2
# A timer may ring this many seconds early; what it ended was ended by the deadline all the same.
TIMER_SLACK = 0.05


async def align(plan: Plan, engine: Engine, rewards: Mapping[str, Reward], on_delta: OnDelta | None = None) -> Response:
    """Carry out a plan.

    Args:
        plan: from `infer_align.request.make_plan`.
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
    last_draw = deadline and deadline - (SCORING_SHARE * (deadline - started) if plan.rewards else 0.0)

    candidates = await propose(plan, engine, on_delta, last_draw)
    generated = monotonic()
    partial = any(candidate.cut for candidate in candidates)

    scores = await score(plan, rewards, candidates, deadline)
    selection = select(plan, candidates, scores)
    if not selection.ranking:
        late = deadline is not None and monotonic() >= deadline - TIMER_SLACK
        first = next(iter(selection.dropped.values()))
        if plan.candidates > 1 and not late:
            raise RewardFailed(f"{selection.reason}; first: {first}")
        why = "the deadline passed before scoring: the first candidate drawn" if late else f"nothing to compare; {first}"
        selection = replace(selection, ranking=tuple(c.index for c in candidates if c.error is None), reason=why)
        partial = partial or late

    ended = monotonic()
    timing = Timing(generated - started, ended - generated, ended - started)
    return Response(plan, candidates, scores, selection, timing, partial)


async def propose(
    plan: Plan, engine: Engine, on_delta: OnDelta | None = None, deadline: float | None = None
) -> tuple[Candidate, ...]:
    """All candidates of all draws, numbered through; at `deadline` (monotonic seconds) those still running are cut."""
    if len(plan.draws) == 1:
        drawn = [await _sample(engine, plan.draws[0], on_delta, deadline)]
    else:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(_sample(engine, draw, on_delta, deadline)) for draw in plan.draws]
        except ExceptionGroup as failures:  # one draw was refused, the others are cancelled: say it as if it were alone
            raise failures.exceptions[0] from None
        drawn = [task.result() for task in tasks]
    candidates = tuple(drawn[0])
    for i, batch in enumerate(drawn[1:], start=1):
        candidates += tuple(replace(candidate, draw=i, index=len(candidates) + j) for j, candidate in enumerate(batch))
    if all(c.error is not None or (c.cut and not c.completion_tokens) for c in candidates):
        first = next((c for c in candidates if c.error is not None and not c.cut), None)
        if first is None:
            raise DeadlineExceeded(f"no candidate had produced anything after {plan.deadline_seconds:.3g} s; allow more time.")
        raise EngineFailed(f"all {len(candidates)} candidates failed; first: {first.error}", status=first.status)
    return candidates


async def _sample(engine: Engine, draw: Draw, on_delta: OnDelta | None, deadline: float | None) -> list[Candidate]:
    loop = asyncio.get_running_loop()
    finished: dict[int, Candidate] = {}
    async with engine.sample(draw) as stream:
        alarm = None if deadline is None else loop.call_at(_loop_time(deadline), stream.stop)
        try:
            async with asyncio.timeout_at(None if deadline is None else _loop_time(deadline) + GRACE_SECONDS):
                async for event in stream:
                    if isinstance(event, Candidate):
                        finished[event.index] = event
                    elif on_delta is not None:
                        on_delta(event)
        except TimeoutError:
            pass  # what is missing is filled in below
        finally:
            if alarm:
                alarm.cancel()
    return [finished.get(i) or Candidate(i, {}, error="the deadline passed", cut=True) for i in range(draw.n)]


async def score(
    plan: Plan, rewards: Mapping[str, Reward], candidates: Sequence[Candidate], deadline: float | None = None
) -> Scores:
    """Every reward of the plan over the candidates that did not fail, all at once. What fails or is late is NaN."""
    if not plan.rewards:
        return Scores()
    alive = [c for c in candidates if c.error is None]
    names = list(dict.fromkeys(name.partition(".")[0] for name in plan.rewards))
    messages: Messages = plan.draws[0].body.get("messages", ())
    marks = dict(
        zip(names, await asyncio.gather(*(_mark(rewards[name], messages, alive, deadline) for name in names)), strict=True)
    )
    members, notes = {}, {}
    for name in plan.rewards:
        base, _, attribute = name.partition(".")
        reward, mark = rewards[base], marks[base]
        row = reward.attributes.index(attribute) if attribute else 0
        members[name] = np.full((len(reward.members), len(candidates)), np.nan)
        members[name][:, [c.index for c in alive]] = mark.values[row]
        told = dict(zip((c.index for c in alive), mark.notes, strict=False))
        notes[name] = tuple(told.get(i) for i in range(len(candidates)))
    return Scores(members, sum(mark.tokens for mark in marks.values()), notes)


async def _mark(reward: Reward, messages: Messages, candidates: Sequence[Candidate], deadline: float | None) -> Marks:
    shape = (max(1, len(reward.attributes)), len(reward.members), len(candidates))
    seconds = reward.timeout_seconds if deadline is None else min(reward.timeout_seconds, deadline - monotonic())
    try:
        async with asyncio.timeout(seconds):
            marks = await reward.score(messages, candidates)
        if marks.values.shape != shape:
            raise ValueError(f"the reward returned shape {marks.values.shape}, expected {shape}")
        return replace(marks, values=np.where(np.isfinite(marks.values), marks.values, np.nan))  # infinity compares nothing
    except TimeoutError:
        why = f"no score within {max(0.0, seconds):.3g} s"
    except AlignError as error:
        why = error.message
    except Exception as error:  # a reward is the user's code: whatever it raises is data, not a crash
        why = f"{type(error).__name__}: {error}"
    return Marks(np.full(shape, np.nan), 0, (why,) * len(candidates))


def _loop_time(deadline: float) -> float:
    """`deadline`, monotonic seconds, on the event loop's own clock."""
    return asyncio.get_running_loop().time() + (deadline - monotonic())
