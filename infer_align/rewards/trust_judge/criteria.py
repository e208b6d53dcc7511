"""Combine the readings of several criteria into one: hard rules multiply, principles average.

    score u of a criterion, scaled to 0..1      u = product of hard rules x weighted mean of others
    chance p that answer i beats answer j       p = a / (a + b), a from all p and b from all 1 - p

A negated criterion prefers less of its quality: its score is mirrored on the scale, its chance is
1 - p. A reading that is missing leaves the combination missing, because a mean over fewer
principles cannot be compared with the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from infer_align.methods.trust_judge import Aspects, Principle

# What the aspects of UltraFeedback (2310.01377) mean, in the judge's words.
KNOWN_ASPECTS = {
    "instruction_following": "follows the instruction and all of its constraints",
    "truthfulness": "true, without invented facts and without contradictions",
    "honesty": "as certain as the facts allow, and open about what is not known",
    "helpfulness": "helpful, complete and to the point",
}


# A smaller sum of two shares is the rounding of zero.
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Criterion:
    """One quality that the judge reads by itself."""

    text: str
    weight: float = 1.0  # in the mean; a hard rule has none
    negate: bool = False
    hard: bool = False
    name: str | None = None  # of an aspect


@dataclass(frozen=True, slots=True)
class Objective:
    """The criteria of one score. An aspect has a name, the only score of a judge has none."""

    criteria: tuple[Criterion, ...]
    name: str | None = None

    @property
    def is_plain(self) -> bool:
        """Return True if the only reading is the score itself."""
        return len(self.criteria) == 1 and not self.criteria[0].negate

    def score(self, scores: Sequence[float], scale: int) -> float:
        """Return one score on 1..scale from the scores of the criteria; NaN if one is NaN."""
        if self.is_plain:
            return scores[0]
        directed: list[float] = []
        for criterion, score in zip(self.criteria, scores, strict=True):
            directed.append(directed_score(criterion, score, scale))
        shares = [(score - 1.0) / (scale - 1.0) for score in directed]
        return 1.0 + (scale - 1.0) * self._combined(shares)

    def chance(self, chances: Sequence[float]) -> float:
        """Return the chance of the first answer from its chances by each criterion.

        It is NaN if one is NaN, and 0.5 if hard rules exclude both answers.
        """
        directed: list[float] = []
        for criterion, chance in zip(self.criteria, chances, strict=True):
            directed.append(directed_chance(criterion, chance))
        first = self._combined(directed)
        second = self._combined([1.0 - chance for chance in directed])
        total = first + second
        return 0.5 if total < _ROUNDING else first / total

    def _combined(self, shares: Sequence[float]) -> float:
        """Return the product of the hard rules times the weighted mean of the others."""
        product = 1.0
        weighted: list[float] = []
        total_weight = 0.0
        for criterion, share in zip(self.criteria, shares, strict=True):
            if criterion.hard:
                product *= share
            else:
                weighted.append(criterion.weight * share)
                total_weight += criterion.weight
        if not weighted:
            return product
        return product * math.fsum(weighted) / total_weight


def directed_score(criterion: Criterion, score: float, scale: int) -> float:
    """Return a score on 1..scale that is higher for answers that the criterion prefers."""
    return scale + 1.0 - score if criterion.negate else score


def directed_chance(criterion: Criterion, chance: float) -> float:
    """Return the chance that the first answer is the one that the criterion prefers."""
    return 1.0 - chance if criterion.negate else chance


def from_principles(principles: Sequence[Principle]) -> tuple[Criterion, ...]:
    """Return the criteria of principles."""
    criteria: list[Criterion] = []
    for principle in principles:
        criteria.append(Criterion(principle.text, principle.weight, principle.negate))
    return tuple(criteria)


def aspect_texts(aspects: Aspects) -> dict[str, str]:
    """Return {name: words}. A name without words means itself, unless it is a known aspect."""
    if isinstance(aspects, Mapping):
        return dict(aspects)
    texts: dict[str, str] = {}
    for name in aspects:
        texts[name] = KNOWN_ASPECTS.get(name, name.replace("_", " "))
    return texts
