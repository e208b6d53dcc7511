"""Rank the candidates by their scores, and say in one sentence why the first one won."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from infer_align.errors import DeadlineExceeded, RewardFailed
from infer_align.flow.answers import cut_by, in_play, without_echo
from infer_align.flow.plan import Plan
from infer_align.flow.rules import Highest
from infer_align.flow.scorers import Scorer
from infer_align.methods import Contest, Ranking
from infer_align.stages import stage
from infer_align.types import Array, Candidate, Scores, Selection

IGNORED = "all directions gave the same answer; the model may ignore directions"


class NothingScored(RewardFailed):
    """None of several candidates could be scored, or observers rejected every candidate.

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

    If no candidate could be compared, a single candidate is returned as it is. Several are returned
    if the deadline passed: by the rewards that scored in time, or else whole answers first, and
    empty ones last.

    Args:
        plan: the plan.
        candidates: numbered from 0.
        scores: of the plan's scorers.
        late: True if the deadline has passed.

    Raises:
        NothingScored: there are several candidates and none could be scored.
    """
    with stage("select"):
        selection = rank_candidates(plan, candidates, scores)
    if selection.ranking:
        cut_short = DeadlineExceeded.__name__ in scores.errors.values()
        return replace(selection, late=late and cut_short)
    in_time = _ranked_in_time(plan, candidates, scores) if late else None
    if in_time is not None:
        return replace(in_time, values=selection.values, late=True)
    first = next(iter(selection.dropped.values()))
    if late:
        reason = "the deadline passed before scoring: the first whole candidate, if there is one"
    elif plan.candidates == 1:
        reason = f"nothing to compare; {first}"
    else:
        raise NothingScored(f"{selection.reason}; first: {first}", candidates, scores)
    eligible = [candidate for candidate in candidates if candidate.eligible]
    eligible.sort(key=_incompleteness)
    ranking = tuple(candidate.index for candidate in eligible)
    return replace(selection, ranking=ranking, reason=reason, late=late)


def _ranked_in_time(
    plan: Plan, candidates: Sequence[Candidate], scores: Scores
) -> Selection | None:
    """Rank by the rewards that scored before the deadline, whatever the rule.

    Returns None if they do not choose, or if a shape or a gate needs another reward.
    """
    scored: list[Scorer] = []
    for scorer in plan.scorers:
        if not np.isnan(scores.members[scorer.name]).all():
            scored.append(scorer)
    names = {scorer.name for scorer in scored}
    composition = plan.composition
    needed = () if composition is None else (*composition.shaped, *composition.gates)
    if not names.issuperset(needed) or not any(scorer.weight for scorer in scored):
        return None
    members = {name: scores.members[name] for name in names}
    part = replace(plan, scorers=tuple(scored), rule=Highest())
    selection = rank_candidates(part, candidates, replace(scores, members=members))
    late = ", ".join(scorer.name for scorer in plan.scorers if scorer.name not in names)
    reason = f"{selection.reason}; the deadline passed before {late} scored"
    return replace(selection, reason=reason) if selection.ranking else None


def _incompleteness(candidate: Candidate) -> tuple[bool, bool]:
    """Return a key that puts whole answers first, and those cut before their first token last."""
    return candidate.interrupted, candidate.interrupted and not candidate.completion_tokens


def rank_candidates(plan: Plan, candidates: Sequence[Candidate], scores: Scores) -> Selection:
    """Rank the candidates: compose their scores, sum them, drop by gates, and apply the rule.

    Without scorers they keep the order of drawing. A candidate is dropped if it failed, was
    rejected while it ran, was cut before its first word, or lacks a score with a weight: a missing
    score is never a 0. So is one that misses a gate, unless all do: then the one that misses by the
    least wins.
    """
    dropped = _ineligible(candidates)
    values = _reduced(plan, scores)
    rule_compares = bool(values) or (plan.selects and not plan.rule.needs_scores)
    if not rule_compares:
        return _in_order_of_drawing(plan, candidates, dropped)
    dropped |= _without_a_word(plan, candidates)
    composed = values if plan.composition is None else plan.composition.compose(values)
    shortfalls = _shortfalls(plan, values, len(candidates))
    objective = _weighted_sum(plan, composed, len(candidates))
    # Not even weights of 0 make a failed candidate comparable, nor one that a gate did not score.
    objective[list(dropped)] = math.nan
    objective[np.isnan(shortfalls)] = math.nan
    for index in np.flatnonzero(np.isnan(objective)).tolist():
        if index not in dropped:
            dropped[index] = f"not scored: {_missing_score(plan, scores, values, index)}"
    compared = np.flatnonzero(~np.isnan(objective))
    passing = compared[shortfalls[compared] == 0]
    if len(passing):
        for index in compared[shortfalls[compared] > 0].tolist():
            objective[index] = math.nan
            dropped[index] = _missed_gate(plan, values, index) or "missed a gate"
        ranking = _apply_rule(plan, passing, candidates, scores, composed, objective)
    else:
        ranking = _least_shortfall(plan, compared, shortfalls, objective)
    missed = len(compared) - len(ranking.order)
    reason = _reason(plan, candidates, objective, ranking, missed)
    reason = _joined(reason, *_remarks(scores))
    if not values:
        # The rule chose without scores.
        objective[:] = math.nan
    selection = Selection(ranking.order, tuple(objective.tolist()), values, dropped, reason)
    return _with_ranking(selection, plan, ranking, composed)


def hold_gates(plan: Plan, selection: Selection) -> Selection:
    """Return the selection without the candidates that miss a gate, also if that is all of them."""
    objective = list(selection.objective)
    dropped = dict(selection.dropped)
    ranking = []
    for index in selection.ranking:
        missed = _missed_gate(plan, selection.values, index)
        if missed is None:
            ranking.append(index)
        else:
            objective[index] = math.nan
            dropped[index] = missed
    return replace(selection, ranking=tuple(ranking), objective=tuple(objective), dropped=dropped)


def _ineligible(candidates: Sequence[Candidate]) -> dict[int, str]:
    """Return {index: reason} of the candidates that failed or were rejected while they ran."""
    reasons = {}
    for candidate in candidates:
        if not candidate.eligible:
            reasons[candidate.index] = candidate.rejected or f"failed: {candidate.error}"
    return reasons


def _without_a_word(plan: Plan, candidates: Sequence[Candidate]) -> dict[int, str]:
    """Return {index: reason} of the candidates that were cut before they said anything."""
    playing = {candidate.index for candidate in in_play(plan, candidates)}
    reasons = {}
    for candidate in candidates:
        if candidate.eligible and candidate.index not in playing:
            reasons[candidate.index] = f"cut by {cut_by(candidate)} before its first word"
    return reasons


def _reduced(plan: Plan, scores: Scores) -> dict[str, Array]:
    """Return one value per reward and candidate: the objective of the reward's members."""
    values = {}
    for name, members in scores.members.items():
        values[name] = plan.ensemble.reduce(members)
    return values


def _in_order_of_drawing(
    plan: Plan, candidates: Sequence[Candidate], dropped: Mapping[int, str]
) -> Selection:
    """Return the selection of a plan that compares nothing."""
    order = []
    for candidate in candidates:
        if candidate.eligible:
            order.append(candidate.index)
    not_compared = (math.nan,) * len(candidates)
    reason = _joined(_plain_reason(plan), _ignored_directions(plan, candidates))
    return Selection(tuple(order), not_compared, {}, dropped, reason)


def _with_ranking(
    selection: Selection, plan: Plan, ranking: Ranking, composed: Mapping[str, Array]
) -> Selection:
    """Return the selection with what the rule computed beside the order."""
    return replace(
        selection,
        composed={} if plan.composition is None else composed,
        rule=plan.rule.name,
        distribution=ranking.distribution,
        pairwise=ranking.pairwise,
        condorcet=ranking.condorcet,
        cycles=ranking.cycles,
        worst_case=ranking.worst_case,
    )


def _shortfalls(plan: Plan, values: Mapping[str, Array], candidates: int) -> Array:
    """Return by how much each candidate misses the gates; 0 without gates."""
    if plan.composition is None or not plan.composition.gates:
        return np.zeros(candidates)
    return plan.composition.shortfalls(values)


def _apply_rule(
    plan: Plan,
    compared: NDArray[np.intp],
    candidates: Sequence[Candidate],
    scores: Scores,
    composed: Mapping[str, Array],
    objective: Array,
) -> Ranking:
    """Rank the candidates that can be compared by the rule of the plan."""
    names: list[str] = []
    weights: list[float] = []
    rows: list[Array] = []
    for scorer in plan.scorers:
        # Weight 0 shows a score without counting it.
        if scorer.weight:
            names.append(scorer.name)
            weights.append(scorer.weight)
            rows.append(composed[scorer.name][compared])
    matrices = {}
    for name, probabilities in scores.matrices.items():
        matrices[name] = probabilities[np.ix_(compared, compared)]
    composition = plan.composition
    competitors = [candidates[i] for i in compared]
    contest = Contest(
        objective=objective[compared],
        names=tuple(names),
        values=np.reshape(rows, (len(rows), len(compared))),
        weights=np.array(weights),
        shaped=frozenset() if composition is None else frozenset(composition.shaped),
        matrices=matrices,
        texts=tuple(without_echo(plan, candidate).text for candidate in competitors),
        tokens=tuple(candidate.completion_tokens for candidate in competitors),
        measure=_measure(plan),
        drawn=len(candidates),
        seed=plan.seed,
        n_returned=plan.n_returned,
    )
    return _numbered(plan.rule.rank(contest), compared, len(candidates))


def _numbered(ranking: Ranking, compared: NDArray[np.intp], candidates: int) -> Ranking:
    """Return a ranking of the compared candidates with their indices among all of them."""
    order = tuple(int(compared[i]) for i in ranking.order)
    distribution = None
    if ranking.distribution is not None:
        probabilities = np.zeros(candidates)
        probabilities[compared] = ranking.distribution
        distribution = tuple(probabilities.tolist())
    condorcet = ranking.condorcet
    if condorcet is not None:
        condorcet = int(compared[condorcet])
    return replace(ranking, order=order, distribution=distribution, condorcet=condorcet)


def _least_shortfall(
    plan: Plan, compared: NDArray[np.intp], shortfalls: Array, objective: Array
) -> Ranking:
    """Rank candidates that all miss a gate by how little they miss, then by the objective."""
    order = sorted(compared.tolist(), key=lambda i: (shortfalls[i], -objective[i], i))
    gates = {} if plan.composition is None else plan.composition.gates
    clause = f"all {len(order)} candidates miss a gate ({', '.join(gates)}); this one by the least"
    return Ranking(tuple(order), clause)


def _missed_gate(plan: Plan, values: Mapping[str, Array], index: int) -> str | None:
    """Return the first gate that a candidate misses; None if it passes all of them."""
    gates = {} if plan.composition is None else plan.composition.gates
    for name, limit in gates.items():
        value = values[name][index]
        if value < limit:
            return f"missed a gate: {name} {value:.3g} is under at_least {limit:g}"
    return None


def _measure(plan: Plan) -> str:
    """Return the name of the objective, for the reason."""
    name = plan.ensemble.objective
    return name if plan.composition is None else f"composed {name}"


def _weighted_sum(plan: Plan, values: Mapping[str, Array], candidates: int) -> Array:
    total = np.zeros(candidates)
    for scorer in plan.scorers:
        # Weight 0 shows a score without counting it, even if it is NaN.
        if scorer.weight:
            total = total + scorer.weight * values[scorer.name]
    return total


def _missing_score(plan: Plan, scores: Scores, values: Mapping[str, Array], index: int) -> str:
    """Return the scorer that left a candidate without a score, and its note."""
    gates = {} if plan.composition is None else plan.composition.gates
    for scorer in plan.scorers:
        counts = scorer.weight or scorer.name in gates
        if counts and np.isnan(values[scorer.name][index]):
            return f"{scorer.name}: {scores.notes[scorer.name][index] or 'NaN'}"
    return "the weighted sum is not a number"


def _plain_reason(plan: Plan) -> str:
    """Return the reason of a plan without scorers."""
    draw = plan.draws[0] if plan.draws else None
    clauses = ["one draw"]
    if draw is not None and draw.direction is not None:
        weights = ", ".join(f"{name} {weight:.3g}" for name, weight in draw.direction.items())
        clauses.append(f"in the direction {weights}")
    if draw is not None and draw.guidance:
        contrasts = draw.guidance.contrasts
        scales = ", ".join(f"{contrast.trait} {contrast.scale:g}" for contrast in contrasts)
        clauses.append(f"guided by {scales}")
    if draw is not None and draw.steering is not None:
        weights = ", ".join(f"{name} {weight:g}" for name, weight in draw.steering.beta.items())
        clauses.append(f"steered by vas with beta {weights}")
    if len(clauses) == 1:
        clauses.append("nothing to compare")
    return ", ".join(clauses)


def _reason(
    plan: Plan, candidates: Sequence[Candidate], objective: Array, ranking: Ranking, missed: int
) -> str:
    clauses = [_comparison(plan, objective, ranking, missed)]
    rejected = sum(candidate.rejected is not None for candidate in candidates)
    if rejected:
        clauses.append(f"{rejected} of them stopped early")
    if missed and len(ranking.order) > 1:
        clauses.append(f"{missed} of them missed a gate")
    clauses += [plan.note, _ignored_directions(plan, candidates)]
    return _joined(*clauses)


def _remarks(scores: Scores) -> list[str]:
    """Return what each reward says about the limits of its scoring."""
    return [f"{name}: {remark}" for name, remark in scores.remarks.items()]


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


def _comparison(plan: Plan, objective: Array, ranking: Ranking, missed: int) -> str:
    candidates = len(objective)
    if not ranking.order:
        return f"none of {candidates} candidates could be scored"
    value = f" ({_measure(plan)} {objective[ranking.order[0]]:.3g})" if plan.scorers else ""
    if candidates == 1:
        return f"one candidate, nothing to compare{value}"
    if len(ranking.order) == 1:
        survived = "passed the gates" if missed else "could be compared"
        return f"the only one of {candidates} candidates that {survived}{value}"
    return ranking.clause
