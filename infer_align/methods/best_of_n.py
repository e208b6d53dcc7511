"""Best-of-n: draw n candidates from the frozen model and return the one that the rewards prefer.

The flow selects. This file holds the number of draws and two figures of merit: an unbiased
estimator of the value of the best of n, and a bound on the distance from the model.

Source: Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization" (2310.02743),
appendix B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from infer_align.methods import PlanDraft, Stage
from infer_align.types import Array, Capability


@dataclass(frozen=True, slots=True)
class BestOfN:
    """Draw n candidates per prompt and return the best by the rewards."""

    n: int = field(
        default=8,
        metadata={
            "ge": 1,
            "json_schema_extra": {"x-slider": {"minimum": 1, "maximum": 32, "step": 1}},
            "description": "Candidates per prompt; with rps, per direction.",
        },
    )

    stage: ClassVar[Stage] = Stage.PROPOSE
    needs: ClassVar[frozenset[Capability]] = frozenset()
    relies_on: ClassVar[str] = "rewards"
    fan_out: ClassVar[str] = "n"

    def apply(self, draft: PlanDraft) -> PlanDraft:
        """Enlarge every draw n times, and select among all candidates."""
        draws = tuple(replace(draw, n=draw.n * self.n) for draw in draft.draws)
        note = draft.note
        if not note and self.n > 1 and draft.draws[0].body.get("temperature") == 0:
            note = "temperature 0 draws equal candidates; set a temperature over 0"
        return replace(draft, draws=draws, selects=True, note=note)


plugin = BestOfN


def expected_best(proxy: ArrayLike, gold: ArrayLike, n: int) -> float:
    """Return the mean gold score of the best-by-proxy candidate over all n-subsets (eq. 8).

    The estimator is unbiased. Candidates with equal proxy scores count as ordered at random, so
    each of them gets the mean of their weights.

    The published code expects sorted input, and its ensemble runs sort the proxy scores but not the
    gold scores, which pairs them wrongly. Here both are sorted by the proxy.

    Args:
        proxy: [N] scores that select.
        gold: [N] scores that judge the selected candidate.
        n: size of the subsets, from 1 to N.

    Raises:
        ValueError: the shapes differ, a score is NaN, or n is outside 1..N.
    """
    selector = np.asarray(proxy, dtype=np.float64)
    judge = np.asarray(gold, dtype=np.float64)
    if selector.ndim != 1 or selector.shape != judge.shape:
        raise ValueError(
            f"proxy and gold: shapes {selector.shape} and {judge.shape} are not allowed; both must "
            "be [N]."
        )
    if np.isnan(selector).any() or np.isnan(judge).any():
        raise ValueError(
            "proxy or gold: NaN is not allowed; leave out the candidates that were not scored."
        )
    if not 1 <= n <= len(selector):
        raise ValueError(
            f"n: {n} is not allowed; must be 1 to {len(selector)}, the number of candidates."
        )
    # Candidates with equal proxy scores share a group; groups ascend by proxy score.
    _, group = np.unique(selector, return_inverse=True)
    sizes = np.bincount(group)
    ranks = np.argsort(np.argsort(selector, kind="stable"))
    weights = np.bincount(group, weights=_subset_weights(len(selector), n)[ranks])
    mean_gold = np.bincount(group, weights=judge) / sizes
    # Candidates that no subset selects may have an infinite gold score.
    used = weights > 0
    return float(weights[used] @ mean_gold[used])


def kl_upper_bound(n: int) -> float:
    """Return ln n - (n - 1)/n, an upper bound in nats on KL(best-of-n || model) (eq. 1).

    The bound is exact only if no two answers are equal.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n: {n} is not allowed; must be at least 1.")
    return math.log(n) - (n - 1) / n


def _subset_weights(total: int, n: int) -> Array:
    """Return C(i-1, n-1) / C(N, n) for i = 1..N.

    Computed by the recurrence w_N = n/N, w_(i-1) = w_i (i - n)/(i - 1), which cannot overflow.
    """
    ranks = np.arange(total, 1, -1, dtype=np.float64)  # N .. 2
    factors = np.clip((ranks - n) / (ranks - 1), 0.0, None)
    descending = np.concatenate([[1.0], np.cumprod(factors)])
    weights: Array = descending[::-1] * (n / total)
    return weights
