"""Follow the gold of the best of n as n grows, and find where it stops to rise.

A reward is a proxy of what people want. Choosing harder by it finds answers that it likes more, but
at some n these are answers that it likes for the wrong reason, and gold falls: over-optimisation.

Sources: Gao et al., "Scaling Laws for Reward Model Overoptimization" (2210.10760), for the curve
over the KL of best-of-n; Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization"
(2310.02743), appendix B, for the unbiased estimator and the bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from infer_align.diagnostics.statistics import Statistic, mean_over_prompts
from infer_align.methods.best_of_n import expected_best, kl_upper_bound
from infer_align.types import Array

# Share of the pools that must have n answers for n to be on the curve.
REACH = 0.75
# The steps of n between two powers of two.
STEPS = (1.0, 1.5)


@dataclass(frozen=True, slots=True)
class GoldCurve:
    """The gold of the best of n by one selector.

    Attributes:
        n: sizes, ascending from 1.
        gold: [G, len(n)], per prompt.
    """

    n: tuple[int, ...]
    gold: Array

    @property
    def kl(self) -> tuple[float, ...]:
        """Return the upper bound of KL from the model at each n, in nats."""
        return tuple(kl_upper_bound(n) for n in self.n)

    @property
    def means(self) -> tuple[Statistic, ...]:
        """Return the mean over prompts at each n."""
        return tuple(mean_over_prompts(column) for column in self.gold.T)

    @property
    def peak(self) -> int:
        """Return the index of the n with the highest gold; the smallest one of several."""
        return int(np.argmax(self.gold.mean(axis=0)))

    def change(self, start: int, end: int) -> Statistic:
        """Return the gain from one index to another, computed prompt by prompt."""
        return mean_over_prompts(self.gold[:, end] - self.gold[:, start])


@dataclass(frozen=True, slots=True)
class Trust:
    """The n up to which choosing by a reward is backed by gold.

    Attributes:
        n: the peak, or 1 if choosing by the reward gains nothing that can be measured.
        peak: the n with the highest gold.
        gain: gold at the peak minus gold of a single draw.
        fall: gold at the largest n minus gold at the peak; 0 if the peak is the largest n.
        largest: the largest n that was measured.
    """

    n: int
    peak: int
    gain: Statistic
    fall: Statistic
    largest: int

    @property
    def is_limited_by_data(self) -> bool:
        """Return True if gold still rises at the largest n, so its peak may lie higher."""
        return self.n == self.largest


def sizes(answers: Sequence[int], reach: float = REACH) -> tuple[int, ...]:
    """Return the n of a curve: 1, 2, 3, 4, 6, 8, 12, ... and the largest one.

    Args:
        answers: the number of answers of each pool.
        reach: share of the pools that must have n answers.

    Returns:
        () without pools.
    """
    if not answers:
        return ()
    ordered = sorted(answers, reverse=True)
    largest = ordered[min(len(ordered), math.ceil(reach * len(ordered))) - 1]
    grid = {largest}
    power = 1
    while power <= largest:
        for step in STEPS:
            n = round(power * step)
            if n <= largest:
                grid.add(n)
        power *= 2
    return tuple(sorted(grid - {0}))


def gold_curve(
    proxies: Sequence[ArrayLike], gold: Sequence[ArrayLike], grid: Sequence[int]
) -> GoldCurve:
    """Return the expected gold of the best of n for each n of a grid.

    Pools with fewer answers than the largest n are left out, so that every n is measured on the
    same prompts.

    Args:
        proxies: G rows [N_g] of scores that select; answers that are NaN are left out.
        gold: rows of the same lengths; answers that are NaN are left out.
        grid: sizes n, ascending.
    """
    rows: list[list[float]] = []
    for proxy, judged in zip(proxies, gold, strict=True):
        x = np.asarray(proxy, dtype=np.float64)
        y = np.asarray(judged, dtype=np.float64)
        present = ~np.isnan(x) & ~np.isnan(y)
        x = x[present]
        y = y[present]
        if grid and len(x) >= grid[-1]:
            rows.append([expected_best(x, y, n) for n in grid])
    # The shape is set for the case without rows.
    matrix = np.array(rows).reshape(len(rows), len(grid))
    return GoldCurve(tuple(grid), matrix)


def mean_curve(curves: Sequence[GoldCurve]) -> GoldCurve:
    """Return the mean of several curves over the same prompts and sizes, prompt by prompt."""
    return GoldCurve(curves[0].n, np.mean([curve.gold for curve in curves], axis=0))


def trust(curve: GoldCurve) -> Trust:
    """Return the n at which gold peaks, if the gain there is over two standard errors, else 1.

    Raises:
        ValueError: the curve has no prompts.
    """
    if not curve.gold.size:
        raise ValueError("curve: no prompts; leave out selectors without scores.")
    peak = curve.peak
    last = len(curve.n) - 1
    gain = curve.change(0, peak)
    fall = curve.change(peak, last)
    n = curve.n[peak] if gain.exceeds(0.0) else 1
    return Trust(n, curve.n[peak], gain, fall, curve.n[last])
