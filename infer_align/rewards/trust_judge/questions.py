"""The objectives that a judge reads the answers to one conversation by."""

from __future__ import annotations

from dataclasses import dataclass, field

from infer_align.rewards.trust_judge.criteria import Criterion, Objective
from infer_align.rewards.trust_judge.rubric import Rubric
from infer_align.types import ScoringUsage


@dataclass(frozen=True, slots=True)
class Questions:
    """The objectives by which the answers to one conversation are read."""

    objectives: tuple[Objective, ...]  # one per attribute
    rubric: Rubric | None = None  # what the judge wrote for the conversation
    spent: ScoringUsage = field(default_factory=ScoringUsage)
    has_principles: bool = False

    @property
    def remark(self) -> str:
        """Return the reason why a generated rubric is not used, and what decides instead."""
        if self.rubric is None or self.rubric.accepted:
            return ""
        instead = "the principles decide" if self.has_principles else "the criteria decide"
        return f"the generated rubric is not used: {self.rubric.reason}; {instead}"

    def together(self) -> Objective:
        """Return one objective, in which all aspects count the same."""
        if len(self.objectives) == 1:
            return self.objectives[0]
        criteria: list[Criterion] = []
        for objective in self.objectives:
            criteria += objective.criteria
        return Objective(tuple(criteria))
