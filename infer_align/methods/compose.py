"""Compose rewards: shape each one before the sum, and gate the candidates.

A weighted sum follows the reward with the largest numbers. A shape puts every reward on a scale
that it cannot leave, so a reward on a wrong scale, or one that a candidate exploits, no longer
decides alone. A gate drops the candidates that miss a reward's minimum, whatever their sum.

    {"quality": {"shape": "rank"}, "safe": {"shape": "par"}, "gates": {"safe": {"at_least": 0.5}}}

Every function takes the scores of one reward for the candidates of one prompt. NaN is not scored:
it stays NaN and is nobody's reference. No function depends on the order of the candidates.

Sources: Fu et al., "Reward Shaping to Mitigate Reward Hacking in RLHF" (2502.18770) for PAR;
Moskovitz et al., "Confronting Reward Model Overoptimization with Constrained RLHF" (2310.04373)
for the cap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from infer_align.methods import Composition, PlanDraft, Stage
from infer_align.objectives import spread, standard_scores
from infer_align.types import Array, Capability

ShapeName: TypeAlias = Literal["raw", "standardize", "rank", "par", "cap"]
# Two larger numbers may differ by an infinite amount.
_HUGE = 1e300


@dataclass(frozen=True, slots=True)
class RewardShape:
    """The shape in which one reward enters the sum."""

    shape: ShapeName = field(
        default="raw",
        metadata={
            "description": '"raw": as it is. "standardize": mean 0 and deviation 1 over the '
            'candidates. "rank": average ranks from 0 to 1. "par": mean sigmoid of the distance '
            'to reference scores. "cap": no more than a quantile of the scores.'
        },
    )
    references: int = field(
        default=0,
        metadata={
            "json_schema_extra": {"x-read-if": {"shape": ["par"]}},
            "ge": 0,
            "description": "par: number of other candidates that serve as references, spread "
            "evenly over their scores; 0: all of them.",
        },
    )
    at: float = field(
        default=0.9,
        metadata={
            "json_schema_extra": {"x-read-if": {"shape": ["cap"]}},
            "ge": 0,
            "le": 1,
            "description": "cap: the quantile that no score exceeds.",
        },
    )

    def apply(self, scores: Array) -> Array:
        """Return the shaped scores: [N] -> [N]; NaN stays NaN."""
        if self.shape == "standardize":
            return standardize(scores)
        if self.shape == "rank":
            return rank(scores)
        if self.shape == "par":
            return _par_among(scores, self.references)
        if self.shape == "cap":
            return cap(scores, self.at)
        return scores


@dataclass(frozen=True, slots=True)
class Gate:
    """A minimum that a candidate must reach."""

    at_least: float = field(
        metadata={"description": "The lowest score, before any shape, that passes."}
    )


@dataclass(frozen=True, slots=True)
class Compose:
    """Shape each reward before the sum, and drop candidates that miss a minimum."""

    shapes: dict[str, RewardShape] = field(
        default_factory=dict,
        metadata={
            # Each key that is no other field is the name of a reward.
            "rest": None,
            "placeholder": "<reward>",
            "description": "The shape of one reward, by its name: {shape, references, at}.",
        },
    )
    gates: dict[str, Gate] = field(
        default_factory=dict,
        metadata={
            "json_schema_extra": {"x-names": "rewards"},
            "description": '{reward: {"at_least": number}}: a candidate with a lower score is '
            "dropped. If all miss a gate, the one that misses by the least wins.",
        },
    )

    stage: ClassVar[Stage] = Stage.SELECT
    needs: ClassVar[frozenset[Capability]] = frozenset()

    def apply(self, draft: PlanDraft) -> PlanDraft:
        """Write the shapes and the gates into the plan."""
        limits = {name: gate.at_least for name, gate in self.gates.items()}
        return replace(draft, composition=Shapes(self.shapes, limits))


plugin = Compose


@dataclass(frozen=True, slots=True)
class Shapes(Composition):
    """The shapes and gates of one request."""

    shapes: Mapping[str, RewardShape]
    limits: Mapping[str, float]

    @property
    def shaped(self) -> tuple[str, ...]:
        """Return the rewards with a shape."""
        return tuple(self.shapes)

    @property
    def gates(self) -> Mapping[str, float]:
        """Return the lowest score that passes, by reward."""
        return self.limits

    def compose(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Return the shaped scores of each reward: {reward: [N]} -> {reward: [N]}."""
        composed: dict[str, Array] = {}
        for name, scores in values.items():
            shape = self.shapes.get(name)
            composed[name] = scores if shape is None else shape.apply(scores)
        return composed

    def shortfalls(self, values: Mapping[str, Array]) -> Array:
        """Return by how much each candidate misses the gates: {reward: [N]} -> [N]."""
        rows = [values[name] for name in self.limits]
        return shortfalls(np.stack(rows), np.array([*self.limits.values()]))


def standardize(scores: ArrayLike) -> Array:
    """Return scores with mean 0 and standard deviation 1: [N] -> [N].

    Equal scores become 0. Infinite scores stay as they are and do not count in the moments.
    """
    return standard_scores(_row(scores))


def rank(scores: ArrayLike) -> Array:
    """Return average ranks scaled to 0..1: [N] -> [N].

    The lowest score gets 0, the highest 1, equal ones the mean of their ranks. A single score, and
    scores that are all equal, get 1/2. NaN stays NaN.
    """
    values = _row(scores)
    ranks = np.full(len(values), np.nan)
    scored = np.flatnonzero(~np.isnan(values))
    _, group, sizes = np.unique(values[scored], return_inverse=True, return_counts=True)
    middles = np.cumsum(sizes) - (sizes + 1) / 2
    ranks[scored] = middles[group] / (len(scored) - 1) if len(scored) > 1 else 0.5
    return ranks


def par(scores: ArrayLike, references: ArrayLike, slope: float = 1.0) -> Array:
    """Return the mean over m of sigmoid(slope (score - reference_m)): [N], [M] -> [N].

    It is the probability, by the Bradley-Terry model, to be preferred to a reference answer. NaN
    stays NaN, and a NaN reference is left out. Without references every score gives 1/2.

    Source: Fu et al. (2502.18770).
    """
    values = _row(scores)
    rivals = _row(references)
    rivals = rivals[~np.isnan(rivals)]
    if not len(rivals):
        return np.where(np.isnan(values), np.nan, 0.5)
    first = values[:, None]
    second = rivals[None, :]
    with np.errstate(invalid="ignore", over="ignore"):
        # Equal infinities do not differ.
        distance = np.where(first == second, 0.0, first - second)
        preferred = np.where(distance == 0, 0.5, 1 / (1 + np.exp(-slope * distance)))
    return np.asarray(preferred.mean(axis=1))


def cap(scores: ArrayLike, at: float) -> Array:
    """Return min(score, the at-quantile of the scores): [N] -> [N]; NaN stays NaN.

    Quantiles between two scores are interpolated; between an infinite and a finite one, the lower
    one counts.

    Raises:
        ValueError: `at` is not from 0 to 1.
    """
    values = _row(scores)
    if not 0 <= at <= 1:
        raise ValueError(f"at: {at} is not allowed; must be from 0 to 1.")
    scored = values[~np.isnan(values)]
    if not len(scored):
        return values.copy()
    # A quarter of two finite numbers cannot differ by an infinite amount.
    scale = 4.0 if np.abs(scored).max() > _HUGE else 1.0
    with np.errstate(invalid="ignore"):
        limit = scale * np.quantile(scored / scale, at)
    if not np.isfinite(limit):
        limit = np.quantile(scored, at, method="lower")
    return np.asarray(np.minimum(values, limit))


def shortfalls(values: ArrayLike, limits: ArrayLike) -> Array:
    """Return by how much each candidate misses its gates: [G, N], [G] -> [N].

    It is the sum over the gates of max(0, limit - value), each in standard deviations of its
    reward over the candidates, or in its own unit if all scores are equal. A candidate that one of
    the rewards did not score gives NaN.

    Raises:
        ValueError: the shapes do not fit together.
    """
    scores = np.asarray(values, dtype=np.float64)
    minima = np.asarray(limits, dtype=np.float64)
    if scores.ndim != 2 or minima.shape != scores.shape[:1]:
        raise ValueError(f"values {scores.shape}, limits {minima.shape}: must be [G, N], [G].")
    total = np.zeros(scores.shape[1])
    for row, limit in zip(scores, minima, strict=True):
        with np.errstate(over="ignore"):
            missing = np.where(row >= limit, 0.0, limit - row)
            total = total + missing / (spread(row) or 1.0)
    return total


def _par_among(scores: Array, count: int) -> Array:
    """Return PAR with the other candidates as references, or `count` of them: [N] -> [N].

    A candidate is no reference of its own. The references stand at even distances in the order of
    the others' scores, so they do not depend on the order of drawing.
    """
    shaped = np.full(len(scores), np.nan)
    scored = np.flatnonzero(~np.isnan(scores))
    for i in scored.tolist():
        rivals = np.sort(np.delete(scores, i))
        rivals = rivals[~np.isnan(rivals)]
        if 0 < count < len(rivals):
            # The middles of `count` equal parts.
            places = (np.arange(count) + 0.5) * len(rivals) / count
            rivals = rivals[places.astype(np.int64)]
        shaped[i] = par(scores[[i]], rivals)[0]
    return shaped


def _row(scores: ArrayLike) -> Array:
    values = np.array(scores, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"scores: shape {values.shape} is not allowed; must be [N].")
    return values
