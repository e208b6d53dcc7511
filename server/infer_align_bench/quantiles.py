"""Means and percentiles with bootstrap intervals, of one target or as the ratio of two.

Values come in groups, one per request: the gaps within one answer are not independent, so whole requests are drawn again, never
single gaps. Intervals are percentile intervals of 95% (Efron and Tibshirani, "An Introduction to the Bootstrap", chapter 13). A
resample cannot hold more than the sample did: the interval of a p99 is to be trusted from some hundreds of requests on, not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

PERCENTILES = (50, 90, 99)
NAMES = ("mean", *(f"p{q}" for q in PERCENTILES))
LEVEL = 95.0
REPLICATES = 1000
LARGEST = 20_000_000  # counts that are held at once; beyond it there are fewer replicates

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its interval; NaN ends where there is too little to say."""

    value: float
    low: float
    high: float


def estimates(groups: Sequence[ArrayLike], seed: int = 0) -> dict[str, Estimate]:
    """The mean and the percentiles of all values; {} where there are none. Percentiles as numpy's: linear between values."""
    pooled = _Pool(groups)
    if not pooled.values.size:
        return {}
    drawn = np.array([pooled.figures(counts) for counts in _resamples(len(groups), seed)])
    return _estimates(pooled.figures(pooled.once), drawn, len(groups))


def ratios(groups: Sequence[ArrayLike], baseline: Sequence[ArrayLike], seed: int = 0) -> dict[str, Estimate]:
    """The figures of `groups` over those of `baseline`. They are pairs, group by group, and are drawn again as pairs."""
    if len(groups) != len(baseline):
        raise ValueError(f"{len(groups)} groups beside {len(baseline)}: these are no pairs")
    ours, theirs = _Pool(groups), _Pool(baseline)
    if not ours.values.size or not theirs.values.size:
        return {}
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = np.array([ours.figures(counts) / theirs.figures(counts) for counts in _resamples(len(groups), seed)])
        return _estimates(ours.figures(ours.once) / theirs.figures(theirs.once), drawn, len(groups))


def rate(amounts: ArrayLike, seconds: ArrayLike, seed: int = 0) -> Estimate:
    """sum(amounts) / sum(seconds), each pair one request; [N], [N]."""
    amount, time = np.asarray(amounts, dtype=float), np.asarray(seconds, dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = np.array([(counts @ amount) / (counts @ time) for counts in _resamples(len(amount), seed)])
        return _estimates(np.array([amount.sum() / time.sum()]), drawn[:, None], len(amount))["mean"]


class _Pool:
    """All values, sorted, and the group that each is of."""

    def __init__(self, groups: Sequence[ArrayLike]) -> None:
        arrays = [np.atleast_1d(np.asarray(group, dtype=float)) for group in groups]
        values = np.concatenate([*arrays, np.empty(0)])
        owners = np.repeat(np.arange(len(arrays)), [len(array) for array in arrays])
        order = np.argsort(values, kind="stable")
        self.values, self._owners = values[order], owners[order]
        self.once = np.ones(len(arrays), dtype=np.int64)

    def figures(self, counts: NDArray[np.int64]) -> Array:
        """Mean and percentiles where group i stands `counts[i]` times."""
        weights = counts[self._owners]
        until = weights.cumsum()
        total = int(until[-1])
        if not total:
            return np.full(len(NAMES), np.nan)
        place = (total - 1) * np.array(PERCENTILES) / 100
        below = np.floor(place)
        low = self.values[np.searchsorted(until, below, side="right")]
        high = self.values[np.searchsorted(until, np.minimum(below + 1, total - 1), side="right")]
        return np.concatenate([[weights @ self.values / total], low + (high - low) * (place - below)])


def _resamples(groups: int, seed: int) -> NDArray[np.int64]:
    """[replicates, groups]: how often each group is drawn."""
    replicates = int(np.clip(LARGEST // max(1, groups), 200, REPLICATES))
    return np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=replicates)


def _estimates(figures: Array, drawn: Array, groups: int) -> dict[str, Estimate]:
    tail = (100 - LEVEL) / 2
    found = {}
    for name, value, column in zip(NAMES, figures, drawn.T, strict=False):
        finite = column[np.isfinite(column)]
        # One request, drawn again, is always itself: that is ignorance, no narrow interval.
        low, high = np.percentile(finite, [tail, 100 - tail]) if finite.size and groups > 1 else (np.nan, np.nan)
        found[name] = Estimate(float(value), float(low), float(high))
    return found
