"""Decide after each batch of candidates if a plan draws another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from infer_align.flow.batches import CandidateBatch
from infer_align.flow.plan import Plan
from infer_align.flow.selection import rank_candidates
from infer_align.types import Candidate, Scores


@dataclass(frozen=True, slots=True)
class Stop:
    """The end of the drawing of a plan with a stop rule."""

    reason: str  # a clause with the number of candidates drawn
    is_late: bool = False  # True if a deadline ended it


def stop_after(
    batch: CandidateBatch,
    plan: Plan,
    candidates: Sequence[Candidate],
    scores: Scores,
    *,
    late: bool,
) -> Stop | None:
    """Return the end of drawing after a batch, or None if another batch is drawn.

    Args:
        batch: the last batch.
        plan: the plan; without a stop rule it has one batch, whose end needs no report.
        candidates: of all batches so far, numbered from 0.
        scores: of these candidates.
        late: True if the deadline of drawing has passed.
    """
    if plan.stop_rule is None:
        return None
    drew = f"drew {len(candidates)} of at most {plan.candidates}"
    if len(candidates) == plan.candidates:
        count = len(candidates)
        return Stop("drew the only candidate" if count == 1 else f"drew all {count} candidates")
    if late:
        return Stop(f"{drew}: the deadline passed", is_late=True)
    failed = [candidate.error for candidate in candidates[batch.first :] if candidate.error]
    if len(failed) == batch.candidates:
        return Stop(f"{drew}: the last {len(failed)} failed: {failed[0]}")
    # The objective of the selection: what is returned is what the rule was about.
    selection = rank_candidates(plan, candidates, scores)
    if not selection.ranking:
        return Stop(f"{drew}: none could be scored")
    if len(selection.ranking) < plan.n_returned:
        return None
    clause = plan.stop_rule.reason_to_stop(np.array(selection.objective))
    return None if clause is None else Stop(f"{drew}: {clause}")
