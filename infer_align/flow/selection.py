"""Rank the candidates by their scores, and say in one sentence why the first one won."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from infer_align.errors import RewardFailed
from infer_align.flow.plan import Plan
from infer_align.types import Array, Candidate, Scores, Selection

IGNORED = "all directions gave the same answer; the model may ignore directions"


class NothingScored(RewardFailed):
    """There are several candidates and none could be scored.

    Attributes:
        candidates: that were drawn.
        scores: with the usage of scoring.
    """

    def __init__(self, message: str, candidates: Sequence[Candidate], scores: Scores) -> None:
        super().__init__(message)
        self.candidates = tuple(candidates)
        self.scores = scores


def select(
    plan: Plan, candidates: Sequence[Candidate], scores: Scores, *, late: bool = False
) -> Selection:
    """Select the candidates to return, best first.

    If no candidate could be compared, a single candidate is returned as it is; several are returned
    in the order of drawing if the deadline passed before scoring.

    Args:
        plan: the plan.
        candidates: numbered from 0.
        scores: of the plan's scorers.
        late: True if the deadline has passed.

    Raises:
        NothingScored: there are several candidates and none could be scored.
    """
    selection = rank_candidates(plan, candidates, scores)
    if selection.ranking:
        return selection
    first = next(iter(selection.dropped.values()))
    if late:
        reason = "the deadline passed before scoring: the first candidate drawn"
    elif plan.candidates == 1:
        reason = f"nothing to compare; {first}"
    else:
        raise NothingScored(f"{selection.reason}; first: {first}", candidates, scores)
    ranking = tuple(candidate.index for candidate in candidates if candidate.eligible)
    return replace(selection, ranking=ranking, reason=reason, late=late)


def rank_candidates(plan: Plan, candidates: Sequence[Candidate], scores: Scores) -> Selection:
    """Rank the candidates by the weighted sum of their scores, with the rule of the plan.

    Without scorers they keep the order of drawing. A candidate that failed, that was rejected while
    it ran, or that a scorer with weight could not score, is dropped: a missing score is never a 0.
    """
    eligible = [candidate.index for candidate in candidates if candidate.eligible]
    dropped = {c.index: c.rejected or f"failed: {c.error}" for c in candidates if not c.eligible}
    values = {name: plan.ensemble.reduce(members) for name, members in scores.members.items()}
    if not values:
        not_compared = (math.nan,) * len(candidates)
        reason = _joined(_plain_reason(plan), _ignored_directions(plan, candidates))
        return Selection(tuple(eligible), not_compared, values, dropped, reason)
    objective = _weighted_sum(plan, values, len(candidates))
    # Not even weights of 0 make a failed candidate comparable.
    objective[list(dropped)] = math.nan
    # The default rule is `Highest` in rules.py.
    ranking = plan.rule.rank(objective)
    for index in eligible:
        if index not in ranking:
            dropped[index] = f"not scored: {_missing_score(plan, scores, values, index)}"
    reason = _reason(plan, candidates, objective, ranking)
    return Selection(ranking, tuple(objective.tolist()), values, dropped, reason)


def _weighted_sum(plan: Plan, values: Mapping[str, Array], candidates: int) -> Array:
    total = np.zeros(candidates)
    for scorer in plan.scorers:
        # Weight 0 shows a score without counting it, even if it is NaN.
        if scorer.weight:
            total = total + scorer.weight * values[scorer.name]
    return total


def _missing_score(plan: Plan, scores: Scores, values: Mapping[str, Array], index: int) -> str:
    """Return the scorer that left a candidate without a score, and its note."""
    for scorer in plan.scorers:
        if scorer.weight and np.isnan(values[scorer.name][index]):
            return f"{scorer.name}: {scores.notes[scorer.name][index] or 'NaN'}"
    return "the weighted sum is not a number"


def _plain_reason(plan: Plan) -> str:
    """Return the reason of a plan without scorers."""
    steering = plan.draws[0].steering if plan.draws else None
    if steering is None:
        return "one draw, nothing to compare"
    weights = ", ".join(f"{name} {weight:g}" for name, weight in steering.beta.items())
    return f"one draw, steered by vas with beta {weights}"


def _reason(
    plan: Plan, candidates: Sequence[Candidate], objective: Array, ranking: tuple[int, ...]
) -> str:
    clauses = [_comparison(plan, objective, ranking)]
    rejected = sum(candidate.rejected is not None for candidate in candidates)
    if rejected:
        clauses.append(f"{rejected} of them stopped early")
    clauses += [plan.note, _ignored_directions(plan, candidates)]
    return _joined(*clauses)


def _joined(*clauses: str) -> str:
    return "; ".join(clause for clause in clauses if clause)


def _ignored_directions(plan: Plan, candidates: Sequence[Candidate]) -> str:
    """Return a note if greedy answers to several directions are all the same, else "".

    Directions that the prompt rounds to the same numbers are one prompt, and count as one.
    """
    prompts: set[str] = set()
    answers: set[str] = set()
    for candidate in candidates:
        draw = plan.draws[candidate.draw]
        if draw.direction is None or draw.body.get("temperature") != 0:
            return ""
        if candidate.eligible and not candidate.interrupted:
            prompts.add(repr(draw.body.get("messages")))
            answers.add(candidate.text)
    return IGNORED if len(prompts) > 1 and len(answers) == 1 else ""


def _comparison(plan: Plan, objective: Array, ranking: tuple[int, ...]) -> str:
    name = plan.ensemble.objective
    candidates = len(objective)
    if not ranking:
        return f"none of {candidates} candidates could be scored"
    best = objective[ranking[0]]
    if candidates == 1:
        return f"one candidate, nothing to compare ({name} {best:.3g})"
    if len(ranking) == 1:
        return f"the only one of {candidates} candidates that could be compared ({name} {best:.3g})"
    runner_up = objective[ranking[1]]
    return (
        f"{plan.rule.name} {name} of {candidates} candidates "
        f"({best:.3g}; runner-up {runner_up:.3g})"
    )
