"""Best-of-n: draw n candidates from the frozen model, keep the one that the rewards prefer.

Selection itself is the flow's; what belongs to the method alone is how much it draws, and its two figures of merit: the unbiased
estimator of what the best of n is worth, and how far from the model it can have moved. Coste et al. (2310.02743), appendix B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from infer_align.types import Capability, Plan, Stage


@dataclass(frozen=True, slots=True)
class BestOfN:
    """Draw n candidates per prompt (with rps: per direction) and answer with the best by the rewards."""

    n: int = field(
        default=8,
        metadata={"ge": 1, "description": "candidates per prompt; with rps, per direction"},
    )

    stage: ClassVar[Stage] = Stage.PROPOSE
    needs: ClassVar[frozenset[Capability]] = frozenset()

    def plan(self, plan: Plan) -> Plan:
        """Every draw n times as large, and a selection over all of them."""
        return replace(
            plan, draws=tuple(replace(draw, n=draw.n * self.n) for draw in plan.draws), selects=True
        )


plugin = BestOfN


def expected_best(proxy: ArrayLike, gold: ArrayLike, n: int) -> float:
    """Mean gold score of the best-by-proxy candidate over all n-subsets of N candidates: unbiased (eq. 8).

    Both are sorted here, by proxy. The published code expects sorted input, and its ensemble runs sort the proxy but not
    the gold scores, which pairs them wrongly. Equal proxies count as ordered at random: each has the mean of their weights.

    Args:
        proxy: [N] scores that select.
        gold: [N] scores that judge.
        n: size of the subsets, 1 to N.

    Raises:
        ValueError: shapes differ, a score is NaN, or n is outside 1..N.
    """
    selector, judge = np.asarray(proxy, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    if selector.ndim != 1 or selector.shape != judge.shape:
        raise ValueError(
            f"proxy and gold: shapes {selector.shape} and {judge.shape} are not allowed; both must be [N]."
        )
    if np.isnan(selector).any() or np.isnan(judge).any():
        raise ValueError(
            "proxy or gold: NaN is not allowed; leave out the candidates that were not scored."
        )
    if not 1 <= n <= len(selector):
        raise ValueError(
            f"n: {n} is not allowed; must be 1 to {len(selector)}, the number of candidates."
        )
    _, group = np.unique(
        selector, return_inverse=True
    )  # ties share a group, groups ascend by proxy
    sizes = np.bincount(group)
    weight = np.bincount(
        group,
        weights=_subset_weights(len(selector), n)[np.argsort(np.argsort(selector, kind="stable"))],
    )
    return float(weight @ (np.bincount(group, weights=judge) / sizes))


def kl_upper_bound(n: int) -> float:
    """ln n - (n - 1)/n nats: an upper bound on KL(best-of-n || model), exact only where no two answers are alike (eq. 1)."""
    if n < 1:
        raise ValueError(f"n: {n} is not allowed; must be at least 1.")
    return math.log(n) - (n - 1) / n


def _subset_weights(total: int, n: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """C(i-1, n-1) / C(N, n) for i = 1..N, by the recurrence w_N = n/N, w_(i-1) = w_i (i - n)/(i - 1)."""
    ranks = np.arange(total, 1, -1, dtype=np.float64)  # N .. 2
    factors = np.clip((ranks - n) / (ranks - 1), 0.0, None)
    return np.concatenate([[1.0], np.cumprod(factors)])[::-1] * (n / total)
