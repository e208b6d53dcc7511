"""The selection rule of a plan whose methods name no other, and the check of every rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from infer_align.errors import InvalidRequest, nearest
from infer_align.flow.scorers import Scorer, reward_names
from infer_align.methods import Contest, PlanDraft, Ranking, SelectionRule
from infer_align.objectives import rank
from infer_align.rewards import Reward


class Highest(SelectionRule):
    """Ranks the highest objective first; equal candidates stay in the order of their index."""

    name: ClassVar[str] = "argmax"

    def rank(self, contest: Contest) -> Ranking:
        """Return the candidates best first."""
        order = rank(contest.objective)
        clause = f"highest {contest.measure} of {contest.drawn} candidates"
        best = contest.objective[order[0]]
        if len(order) > 1:
            clause += f" ({best:.3g}; runner-up {contest.objective[order[1]]:.3g})"
        return Ranking(order, clause)


def check_selection(
    draft: PlanDraft,
    rule: SelectionRule,
    scorers: Sequence[Scorer],
    rewards: Mapping[str, Reward],
) -> None:
    """Refuse a plan that names rewards it does not score, or lacks what its rule needs.

    Raises:
        InvalidRequest: naming the field, and the nearest name or what is missing.
    """
    if draft.composition is not None:
        for name in draft.composition.shaped:
            _check_scored(name, draft.param("compose", name), draft, scorers, rewards)
        for name in draft.composition.gates:
            _check_scored(name, draft.param("compose", "gates", name), draft, scorers, rewards)
    counted = [scorer for scorer in scorers if scorer.weight]
    judges = [scorer.name for scorer in counted if scorer.reward.compares_pairs]
    rule.check(draft.param("select"), [scorer.name for scorer in counted], judges)


def _check_scored(
    name: str,
    param: str,
    draft: PlanDraft,
    scorers: Sequence[Scorer],
    rewards: Mapping[str, Reward],
) -> None:
    names = [scorer.name for scorer in scorers]
    if name in names:
        return
    configured = reward_names(rewards)
    if name in configured:
        raise InvalidRequest(
            f"{param}: this request does not score {name!r}; give it a weight in "
            f"{draft.param('rewards')}. Weight 0 scores it without counting it.",
            param=param,
        )
    raise InvalidRequest(
        f"{param}: no such reward; {nearest(name, {*names, *configured})}", param=param
    )
