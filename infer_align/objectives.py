"""How the members of a reward ensemble become one score: mean, worst case, uncertainty-weighted.

Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization" (2310.02743), section 3, equations 3 to 5. Two places
where this differs from the paper's published code, on purpose: a weight of 0 is 0 (there it reads as 1), and the variance
is the population's in every path (there the PPO path divides by K - 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infer_align.errors import nearest
from infer_align.types import Array, Direction


def mean(scores: ArrayLike) -> Array:
    """Mean over members (eq. 3). [K, N] -> [N]; NaN members are ignored, a candidate without any gives NaN."""
    members, present = _members(scores)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(present, members, 0.0).sum(axis=0) / _count(present))


def wco(scores: ArrayLike) -> Array:
    """Worst-case optimisation: the lowest member (eq. 4). [K, N] -> [N]; NaN as in `mean`."""
    members, present = _members(scores)
    return np.where(
        present.any(axis=0), np.where(present, members, np.inf).min(axis=0, initial=np.inf), np.nan
    )


def uwo(scores: ArrayLike, uncertainty_weight: float) -> Array:
    """Uncertainty-weighted optimisation: mean - weight * population variance (eq. 5). [K, N] -> [N]; NaN as in `mean`."""
    return mean(scores) - uncertainty_weight * std(scores) ** 2


def std(scores: ArrayLike) -> Array:
    """Population standard deviation over members, two-pass: large offsets do not cancel. [K, N] -> [N]; NaN as in `mean`."""
    members, present = _members(scores)
    with np.errstate(invalid="ignore"):
        deviation = np.where(present, members - mean(members), 0.0)
        return np.asarray(np.sqrt((deviation**2).sum(axis=0) / _count(present)))


def standardize(scores: ArrayLike) -> Array:
    """Each member to mean 0 and standard deviation 1 over the candidates; a constant member to 0. [K, N] -> [K, N]; NaN stays NaN.

    Without it WCO follows the member with the lowest mean, and UWO reads an offset between members as disagreement.
    """
    members, _ = _members(scores)
    spread = std(members.T)[:, None]
    centred = members - mean(members.T)[:, None]
    return np.asarray(
        np.divide(centred, spread, out=np.where(np.isnan(members), np.nan, 0.0), where=spread > 0)
    )


def project(direction: Direction, values: ArrayLike, attributes: Sequence[str]) -> Array:
    """v . r, member by member: [A, K, N] scores of the named attributes -> [K, N]. Wang et al. (2402.18571).

    An attribute of weight 0 is not looked at, even where it is NaN.

    Raises:
        ValueError: the direction names an attribute that was not scored.
    """
    scores = np.asarray(values, dtype=np.float64)
    weights = {name: weight for name, weight in direction.items() if weight}
    if missing := [name for name in weights if name not in attributes]:
        raise ValueError(f"direction.{missing[0]}: not scored; {nearest(missing[0], attributes)}")
    return np.asarray(
        np.tensordot(
            np.array([*weights.values()]),
            scores[[attributes.index(name) for name in weights]],
            axes=1,
        )
    )


def rank(objective: ArrayLike) -> tuple[int, ...]:
    """Candidates best first; equal ones in the order of their index; NaN is left out. [N] -> up to N indices."""
    values = np.asarray(objective, dtype=np.float64)
    order = np.argsort(-values, kind="stable")
    return tuple(int(i) for i in order if not np.isnan(values[i]))


@dataclass(frozen=True, slots=True)
class Ensemble:
    """How the members of each reward become one score."""

    objective: Literal["mean", "wco", "uwo"] = field(
        default="uwo",
        metadata={
            "description": "Mean, worst case over the members, or mean minus weighted variance."
        },
    )
    uncertainty_weight: float = field(
        default=0.5,
        metadata={"ge": 0, "description": "Weight of the members' population variance in uwo."},
    )
    standardize: bool = field(
        default=False,
        metadata={
            "description": "Bring each member to mean 0 and variance 1 over the candidates first."
        },
    )

    def reduce(self, scores: Array) -> Array:
        """[K, N] -> [N], by the chosen objective."""
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
