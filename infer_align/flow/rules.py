"""The selection rule of a plan whose methods name no other."""

from __future__ import annotations

from infer_align.methods import SelectionRule
from infer_align.objectives import rank
from infer_align.types import Array


class Highest(SelectionRule):
    """Ranks the highest objective first; equal candidates stay in the order of their index."""

    name = "highest"

    def rank(self, objective: Array) -> tuple[int, ...]:
        """Return the candidates best first, without those that were not compared."""
        return rank(objective)
