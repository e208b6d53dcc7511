"""Reduce the members of a reward ensemble to one score: mean, worst case, uncertainty-weighted.

Two places differ from the paper's published code on purpose. A weight of 0 is 0 (there it reads as
1). The variance is the population's in every path (there the PPO path divides by K - 1).

Source: Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization" (2310.02743),
section 3, equations 3 to 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infer_align.errors import nearest
from infer_align.types import Array, Direction

Objective = Literal["mean", "wco", "uwo"]


def mean(scores: ArrayLike) -> Array:
    """Return the mean over members (eq. 3): [K, N] -> [N].

    NaN members are ignored; a candidate without any score gives NaN.
    """
    members, present = _members(scores)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(present, members, 0.0).sum(axis=0) / _count(present))


def wco(scores: ArrayLike) -> Array:
    """Return the lowest member, the worst case (eq. 4): [K, N] -> [N]; NaN as in `mean`."""
    members, present = _members(scores)
    lowest = np.where(present, members, np.inf).min(axis=0, initial=np.inf)
    return np.where(present.any(axis=0), lowest, np.nan)


def uwo(scores: ArrayLike, uncertainty_weight: float) -> Array:
    """Return mean - weight * population variance (eq. 5): [K, N] -> [N]; NaN as in `mean`."""
    return mean(scores) - uncertainty_weight * std(scores) ** 2


def std(scores: ArrayLike) -> Array:
    """Return the population standard deviation over members: [K, N] -> [N]; NaN as in `mean`.

    Computed in two passes, so that large offsets do not cancel.
    """
    members, present = _members(scores)
    with np.errstate(invalid="ignore"):
        deviation = np.where(present, members - mean(members), 0.0)
        return np.asarray(np.sqrt((deviation**2).sum(axis=0) / _count(present)))


def standardize(scores: ArrayLike) -> Array:
    """Scale each member to mean 0 and standard deviation 1 over the candidates: [K, N] -> [K, N].

    A constant member becomes 0, NaN stays NaN. Without this, WCO follows the member with the lowest
    mean, and UWO reads an offset between members as disagreement.
    """
    members, _ = _members(scores)
    deviation = std(members.T)[:, None]
    centred = members - mean(members.T)[:, None]
    constant = np.where(np.isnan(members), np.nan, 0.0)
    return np.asarray(np.divide(centred, deviation, out=constant, where=deviation > 0))


def spread(scores: ArrayLike) -> float:
    """Return the population standard deviation of the finite scores: [N] -> at least 0.

    It is 0 if no score is finite, and if all of them are equal, however they are rounded.
    """
    values = np.asarray(scores, dtype=np.float64)
    # Sorted, so that the rounding of sums does not depend on the order of the candidates.
    finite = np.sort(values[np.isfinite(values)])
    if not len(finite) or finite[0] == finite[-1]:
        return 0.0
    # Squares of scores over 1e154 are infinite.
    scale = float(np.abs(finite).max())
    return float(np.std(finite / scale)) * scale


def standard_scores(scores: ArrayLike) -> Array:
    """Return scores with mean 0 and standard deviation 1: [N] -> [N].

    Equal scores become 0, NaN stays NaN. Infinite scores stay as they are and do not count in the
    moments. Unlike `standardize`, it does not overflow.
    """
    values = np.array(scores, dtype=np.float64)
    finite = np.isfinite(values)
    deviation = spread(values)
    if deviation > 0:
        # Halves cannot sum to an infinite difference, and means of quotients cannot overflow.
        quotients = values[finite] / 2 / deviation
        values[finite] = 2 * (quotients - np.sort(quotients).mean())
    else:
        values[finite] = 0.0
    return values


def project(direction: Direction, values: ArrayLike, attributes: Sequence[str]) -> Array:
    """Return v . r for each member: [A, K, N] scores of the named attributes -> [K, N].

    An attribute of weight 0 is not read, even if it is NaN.

    Source: Wang et al. (2402.18571).

    Raises:
        ValueError: the direction names an attribute that was not scored.
    """
    scores = np.asarray(values, dtype=np.float64)
    weights = {name: weight for name, weight in direction.items() if weight}
    for name in weights:
        if name not in attributes:
            raise ValueError(f"direction.{name}: not scored; {nearest(name, attributes)}")
    rows = [attributes.index(name) for name in weights]
    return np.asarray(np.tensordot(np.array([*weights.values()]), scores[rows], axes=1))


def rank(objective: ArrayLike) -> tuple[int, ...]:
    """Return the candidates best first, without NaN: [N] -> up to N indices.

    Equal candidates stay in the order of their index.
    """
    values = np.asarray(objective, dtype=np.float64)
    order = np.argsort(-values, kind="stable")
    return tuple(int(i) for i in order if not np.isnan(values[i]))


@dataclass(frozen=True, slots=True)
class Ensemble:
    """The objective that reduces the members of each reward to one score."""

    objective: Objective = field(
        default="uwo",
        metadata={
            "description": '"mean"; "wco": the lowest member; "uwo": the mean minus the weighted '
            "variance of the members."
        },
    )
    uncertainty_weight: float = field(
        default=0.5,
        metadata={
            "ge": 0,
            "description": "Weight of the population variance of the members in uwo.",
        },
    )
    standardize: bool = field(
        default=False,
        metadata={
            "description": "Scale each member to mean 0 and variance 1 over the candidates first."
        },
    )

    def reduce(self, scores: Array) -> Array:
        """Return one score per candidate: [K, N] -> [N]. NaN members are ignored."""
        members = standardize(scores) if self.standardize else scores
        if self.objective == "uwo":
            return uwo(members, self.uncertainty_weight)
        return mean(members) if self.objective == "mean" else wco(members)


def _members(scores: ArrayLike) -> tuple[Array, NDArray[np.bool_]]:
    members = np.asarray(scores, dtype=np.float64)
    if members.ndim != 2:
        raise ValueError(
            f"scores: shape {members.shape} is not allowed; must be [members, candidates]."
        )
    return members, ~np.isnan(members)


def _count(present: NDArray[np.bool_]) -> Array:
    count: Array = present.sum(axis=0).astype(np.float64)
    count[count == 0] = np.nan
    return count
