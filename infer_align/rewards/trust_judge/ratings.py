"""The scores of a judge, as a tree: a panel has judges, a judge has criteria, those have readings.

`Comparisons` in `tournament.py` is the same tree for comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from infer_align.rewards.trust_judge.judgement import Judgement
from infer_align.rewards.trust_judge.readings import rescale
from infer_align.types import ScoringUsage


@dataclass(frozen=True, slots=True)
class Ratings:
    """The scores of N answers on 1..scale. NaN is not scored, and `errors` holds the reason."""

    scores: tuple[float, ...] = ()
    errors: tuple[str | None, ...] = ()
    judgements: tuple[Judgement, ...] = ()  # the readings, if the scores are read directly
    parts: tuple[Ratings, ...] = ()  # what the scores were combined from

    @property
    def spent(self) -> ScoringUsage:
        """Return the usage of all readings."""
        spent = sum((judgement.spent for judgement in self.judgements), ScoringUsage())
        return sum((part.spent for part in self.parts), spent)

    @property
    def drop_rate(self) -> float:
        """Return the share of answers without a score."""
        return sum(math.isnan(score) for score in self.scores) / max(1, len(self.scores))

    def rescaled_scores(self, scale: int) -> list[float]:
        """Return the scores on 1..5, whatever scale they were read on."""
        return [rescale(score, scale) for score in self.scores]


def first_error(ratings: Sequence[Ratings], answer: int) -> str | None:
    """Return the first reason why an answer has no score in one of several ratings."""
    for rating in ratings:
        if rating.errors[answer] is not None:
            return rating.errors[answer]
    return None
