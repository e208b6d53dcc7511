"""From scores to a ranking, and one plain sentence of why."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from infer_align.objectives import rank
from infer_align.types import Array, Candidate, Plan, Scores, Selection


def select(plan: Plan, candidates: Sequence[Candidate], scores: Scores) -> Selection:
    """Rank the candidates by the weighted sum of their reduced scores; without rewards, in the order they were drawn.

    A candidate that failed, that was given up on its way, or that a reward with weight could not score, is dropped: a missing
    score is never a 0.
    """
    alive = [c.index for c in candidates if c.eligible]
    dropped = {c.index: c.rejected or f"failed: {c.error}" for c in candidates if not c.eligible}
    values = {name: plan.objective.reduce(members) for name, members in scores.members.items()}
    if not values:
        return Selection(
            tuple(alive),
            tuple(math.nan for _ in candidates),
            values,
            dropped,
            "one draw, nothing to compare",
        )
    objective = _weighted_sum(plan, values, len(candidates))
    objective[list(dropped)] = math.nan  # failed: not even weights of 0 make it comparable
    ranking = rank(objective)
    for index in alive:
        if index not in ranking:
            dropped[index] = "not scored: " + _missing(plan, scores, values, index)
    given_up = sum(c.rejected is not None for c in candidates)
    early = f"{given_up} of them stopped early" if given_up else ""
    reason = "; ".join(filter(None, (_reason(plan, objective, ranking), early, plan.note)))
    return Selection(ranking, tuple(objective.tolist()), values, dropped, reason)


def _weighted_sum(plan: Plan, values: dict[str, Array], n: int) -> Array:
    total = np.zeros(n)
    for name, weight in plan.rewards.items():
        if weight:  # weight 0 asks to see a score without letting it count, even where it is NaN
            total = total + weight * values[name]
    return total


def _missing(plan: Plan, scores: Scores, values: dict[str, Array], index: int) -> str:
    for name, value in values.items():
        if plan.rewards[name] and np.isnan(value[index]):
            return f"{name}: {scores.notes[name][index] or 'NaN'}"
    return "the weighted sum is not a number"


def _reason(plan: Plan, objective: Array, ranking: tuple[int, ...]) -> str:
    if not ranking:
        return f"none of {len(objective)} candidates could be scored"
    best = objective[ranking[0]]
    if len(objective) == 1:
        return f"one candidate, nothing to compare ({plan.objective.name} {best:.3g})"
    if len(ranking) == 1:
        return f"the only one of {len(objective)} candidates that could be compared ({plan.objective.name} {best:.3g})"
    return f"highest {plan.objective.name} of {len(objective)} candidates ({best:.3g}; runner-up {objective[ranking[1]]:.3g})"
