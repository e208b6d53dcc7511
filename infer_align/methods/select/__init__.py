"""Selection rules: which candidate is returned, once all of them have scores.

The default returns the candidate with the highest weighted sum. The other rules are for cases in
which a sum decides badly: preferences that form cycles, groups of users that disagree, rewards in
an order of importance, a reward that the best candidates exploit, and answers that are longer than
they need to be. A rule that is a lottery draws with the seed of the request.

This file holds what a request may name. `rules.py` applies the functions of `pairwise.py` and
`scores.py`, which know nothing but arrays.

    P_ij = probability that candidate i is better than candidate j; P_ij + P_ji = 1

Sources: Swamy et al., "A Minimaximalist Approach to RLHF" (2401.04056), for win rates and the
minimax winner; Chakraborty et al., "MaxMin-RLHF" (2402.08925); "HERON" (2306.00186) for
comparisons in an order of importance; Huang et al., "Is Best-of-N the Best of Them?" (2503.21878)
for chi-squared pessimism; Liu et al., "Statistical Rejection Sampling" (2309.06657) for the tilt;
Eikema and Aziz, "Is MAP Decoding All You Need?" (2005.10283) for consensus.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal, TypeAlias

from annotated_types import Len

from infer_align.methods import PlanDraft, SelectionRule, Stage
from infer_align.methods.select.pairwise import (
    condorcet,
    cycles,
    minimax_lottery,
    preferences,
    win_rates,
)
from infer_align.methods.select.rules import (
    Consensus,
    Lexicographic,
    MaxMin,
    Minimax,
    Pessimistic,
    Shortest,
    Tilted,
    WinRate,
)
from infer_align.methods.select.scores import (
    consensus,
    lexicographic,
    maxmin,
    overlap,
    pessimistic,
    shortest,
    tilted,
)
from infer_align.types import Capability

__all__ = [
    "Select",
    "condorcet",
    "consensus",
    "cycles",
    "lexicographic",
    "maxmin",
    "minimax_lottery",
    "overlap",
    "pessimistic",
    "plugin",
    "preferences",
    "shortest",
    "tilted",
    "win_rates",
]

RuleName: TypeAlias = Literal[
    "argmax",
    "win_rate",
    "minimax",
    "maxmin",
    "lexicographic",
    "consensus",
    "pessimistic",
    "tilted",
    "shortest",
]
# In standard deviations of the objective.
PESSIMISTIC_BETA = 0.1
TILTED_BETA = 0.5


@dataclass(frozen=True, slots=True)
class Select:
    """Choose the rule by which a candidate is returned."""

    rule: RuleName = field(
        default="argmax",
        metadata={
            "description": '"argmax": the highest weighted sum. "win_rate": the highest mean '
            'probability to beat another candidate. "minimax": the lottery with the best worst '
            'case against any other. "maxmin": the best for the reward that it serves worst. '
            '"lexicographic": rewards in an order of importance. "consensus": the answer that is '
            'most like the others. "pessimistic": a lottery among the best that the best cannot '
            'dominate. "tilted": a lottery that prefers the best. "shortest": the shortest of '
            "those near the best."
        },
    )
    margin: float = field(
        default=0.25,
        metadata={
            "json_schema_extra": {"x-read-if": {"rule": ["lexicographic"]}},
            "ge": 0,
            "description": "lexicographic: a reward decides between two candidates if they differ "
            "by more than this many of its standard deviations.",
        },
    )
    beta: float | None = field(
        default=None,
        metadata={
            "json_schema_extra": {"x-read-if": {"rule": ["pessimistic", "tilted"]}},
            "gt": 0,
            "description": "pessimistic (0.1) and tilted (0.5): the width of the lottery in "
            "standard deviations of the objective. Near 0 it is argmax.",
        },
    )
    within: float = field(
        default=0.25,
        metadata={
            "json_schema_extra": {"x-read-if": {"rule": ["shortest"]}},
            "ge": 0,
            "description": "shortest: candidates count as good as the best if they are at most "
            "this many standard deviations of the objective below it.",
        },
    )
    order: Annotated[list[str], Len(max_length=64)] = field(
        default_factory=list,
        metadata={
            "json_schema_extra": {
                "x-read-if": {"rule": ["lexicographic", "maxmin", "win_rate", "minimax"]}
            },
            "description": "lexicographic: rewards, most important first; default: by weight. "
            "maxmin, win_rate, minimax: the rewards that count; default: all that have a weight.",
        },
    )
    regret: bool = field(
        default=False,
        metadata={
            "json_schema_extra": {"x-read-if": {"rule": ["maxmin"]}},
            "description": "maxmin: return the candidate with the smallest largest regret, which "
            "is the distance of a reward from its own best candidate.",
        },
    )

    stage: ClassVar[Stage] = Stage.SELECT
    needs: ClassVar[frozenset[Capability]] = frozenset()

    def __post_init__(self) -> None:
        """Check that the order is one.

        Raises:
            ValueError: a reward appears twice.
        """
        if len(set(self.order)) < len(self.order):
            raise ValueError("an object with an order in which each reward appears once")

    def apply(self, draft: PlanDraft) -> PlanDraft:
        """Write the rule into the plan."""
        return replace(draft, rule=self._rule())

    def _rule(self) -> SelectionRule | None:
        order = tuple(self.order)
        rules: dict[RuleName, SelectionRule | None] = {
            # The rule of every plan that names no other.
            "argmax": None,
            "win_rate": WinRate(order),
            "minimax": Minimax(order),
            "maxmin": MaxMin(order, self.regret),
            "lexicographic": Lexicographic(order, self.margin),
            "consensus": Consensus(),
            "pessimistic": Pessimistic(self.beta or PESSIMISTIC_BETA),
            "tilted": Tilted(self.beta or TILTED_BETA),
            "shortest": Shortest(self.within),
        }
        return rules[self.rule]


plugin = Select
