"""Run the flow of one request. Only this file draws candidates and scores them.

Request ─ plan ─▶ Plan ─ engine ─▶ Candidates ─ rewards ─▶ Scores ─ select ─▶ Selection ─▶ Response
"""

from __future__ import annotations

from infer_align.engines import Engine
from infer_align.flow.clock import Clock
from infer_align.flow.plan import Plan
from infer_align.flow.propose import OnDelta, OnFinished, call_both, propose
from infer_align.flow.response import Response
from infer_align.flow.scoring import Scoring
from infer_align.flow.selection import select
from infer_align.flow.stopping import stop_after
from infer_align.types import Candidate


async def align(
    plan: Plan,
    engine: Engine,
    on_delta: OnDelta | None = None,
    on_candidate: OnFinished | None = None,
) -> Response:
    """Carry out the plan of a Request: draw its candidates, score them, select the best.

    Args:
        plan: from `make_plan`.
        engine: started.
        on_delta: called in this event loop with each piece of a candidate as it is sampled.
        on_candidate: called there with each candidate that is finished.

    Raises:
        AlignError: the engine refused the first batch, or failed every candidate of it.
        RewardFailed: no candidate of several could be scored, or observers rejected all of them.
        DeadlineExceeded: the deadline passed before any token.
    """
    clock = Clock(plan.deadline_seconds, scores=bool(plan.scorers))
    candidates: tuple[Candidate, ...] = ()
    async with Scoring(plan, clock.deadline) as scoring:
        finished = call_both(scoring.candidate_finished, on_candidate)
        for batch in plan.batches:
            candidates += await propose(batch, plan, engine, clock, on_delta, finished)
            scores = await scoring.score(candidates)
            if stop := stop_after(batch, plan, candidates, scores, late=clock.drawing_is_late):
                break
    selection = select(plan, candidates, scores, late=clock.late)
    return Response(plan, candidates, scores, selection, clock.timing(), stop)
