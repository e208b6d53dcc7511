"""Means, percentiles, rates and shares with 95% intervals, for one target or as a ratio of two.

Values come in groups, one group per request, in the order of time. Gaps within an answer are not
independent, and neither are requests that waited in one queue. The bootstrap therefore resamples
blocks of neighbouring requests in a circle (the circular block bootstrap of Politis and Romano,
1992). The block length follows from the autocorrelation of the series (Politis and White,
"Automatic block-length selection for the dependent bootstrap", 2004; corrected 2009). Intervals
are percentile intervals.

`arch.bootstrap` does not fit: it resamples arrays with one row per observation, while a request
here has any number of values, and it would add pandas and statsmodels.

Resampling cannot give an upper end that was never observed. The largest of n independent values
lies above the q-th percentile with probability 1 - (q/100)^n. Where that is below 97.5%, the upper
end is NaN; for a p99 this takes 368 values. A block counts as two values.

Coverage: for a queue at 70% use and 1,000 requests, the intervals of mean, p50 and p90 held the
true value in 87 of 100 runs; resampling single requests gives 33 to 39. For an autoregressive
series (coefficient 0.6, 400 values) they held it in 89 to 92 runs, against 61 to 71.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

PERCENTILES = (50, 90, 99)
NAMES = ("mean", *(f"p{q}" for q in PERCENTILES))
LEVEL = 95.0
TAIL = (100 - LEVEL) / 200
REPLICATES = 1000
MIN_REPLICATES = 200
# Groups drawn over all replicates. A longer series gets fewer replicates.
MAX_DRAWS = 20_000_000
# A series has at least this many blocks: with fewer, the resamples are too similar.
MIN_BLOCKS = 8

Array = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class IntervalEstimate:
    """A figure and its interval. An end is NaN if the data are too few to know it."""

    value: float
    low: float
    high: float


def estimates(groups: Sequence[ArrayLike], seed: int = 0) -> dict[str, IntervalEstimate]:
    """Estimate the mean and the percentiles of all values.

    Percentiles are numpy's: linear between neighbouring values.

    Returns:
        {} if there are no values.
    """
    pool = _Pool(groups)
    if not pool.values.size:
        return {}
    length = block_length(pool.means)
    replicates = _replicates(pool.figures, len(groups), length, seed)
    independent = _independent_groups(len(groups), length)
    return _figure_estimates(pool.figures(pool.once), replicates, independent)


def ratios(
    groups: Sequence[ArrayLike], baseline: Sequence[ArrayLike], seed: int = 0
) -> dict[str, IntervalEstimate]:
    """Estimate the figures of `groups` divided by those of `baseline`.

    The groups are pairs and are resampled as pairs.

    Raises:
        ValueError: the numbers of groups differ.
    """
    if len(groups) != len(baseline):
        raise ValueError(
            f"{len(groups)} and {len(baseline)} groups are not pairs; pass equal numbers."
        )
    numerator = _Pool(groups)
    denominator = _Pool(baseline)
    if not numerator.values.size or not denominator.values.size:
        return {}

    def ratio(counts: Counts) -> Array:
        return numerator.figures(counts) / denominator.figures(counts)

    length = max(block_length(numerator.means), block_length(denominator.means))
    independent = _independent_groups(len(groups), length)
    with np.errstate(divide="ignore", invalid="ignore"):
        replicates = _replicates(ratio, len(groups), length, seed)
        return _figure_estimates(ratio(numerator.once), replicates, independent)


@dataclass(frozen=True, slots=True)
class Rate:
    """An amount per second, and its resamples [replicates]."""

    estimate: IntervalEstimate
    replicates: Array

    def over(self, other: Rate) -> IntervalEstimate:
        """Estimate the ratio of two rates that were measured independently."""
        count = min(len(self.replicates), len(other.replicates))
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.float64(self.estimate.value) / other.estimate.value
            replicates = self.replicates[:count] / other.replicates[:count]
            return _estimate(float(value), replicates)


def rate(amounts: ArrayLike, seconds: ArrayLike, seed: int = 0) -> Rate:
    """Estimate sum(amounts) / sum(seconds).

    Args:
        amounts: [N], the amount of each request.
        seconds: [N], the time between the end of the previous request and the end of this one.
        seed: of the resamples.
    """
    amount = np.asarray(amounts, dtype=float)
    time = np.asarray(seconds, dtype=float)

    def quotient(counts: Counts) -> Array:
        return np.asarray((counts @ amount) / (counts @ time))

    length = max(block_length(amount), block_length(time))
    with np.errstate(divide="ignore", invalid="ignore"):
        replicates = _replicates(quotient, len(amount), length, seed)
        value = float(amount.sum() / time.sum())
    # The spread cannot be estimated from one request.
    usable = replicates if len(amount) > 1 else replicates[:0]
    return Rate(_estimate(value, usable), replicates)


def share(successes: int, total: int) -> IntervalEstimate:
    """Estimate a share with Wilson's interval, which is valid where all or none succeed.

    Requests count as independent.
    """
    # Loading it takes a second, and a measurement needs it at its end.
    from scipy.stats import binomtest

    if not total:
        return IntervalEstimate(math.nan, math.nan, math.nan)
    interval = binomtest(successes, total).proportion_ci(LEVEL / 100, method="wilson")
    return IntervalEstimate(successes / total, float(interval.low), float(interval.high))


def block_length(series: ArrayLike) -> int:
    """Return the block length for a series [N] after Politis and White.

    It is 1 for a series without autocorrelation and at most N / MIN_BLOCKS.
    """
    values = np.asarray(series, dtype=float)
    count = len(values)
    longest = count // MIN_BLOCKS
    centred = values - values.mean() if count else values
    if longest < 2 or not centred.any():
        return 1
    lags = int(np.ceil(np.sqrt(count))) + 5
    covariance = _autocovariance(centred, min(2 * lags, count - 1))
    last = _last_correlated_lag(covariance / covariance[0], count, lags)
    if last == 0:
        return 1
    # The flat-top kernel of the paper, over twice the correlated lags.
    bandwidth = min(2 * last, len(covariance) - 1)
    lag = np.arange(1, bandwidth + 1)
    weights = np.clip(2 * (1 - lag / bandwidth), 0, 1)
    weighted = weights * covariance[1 : bandwidth + 1]
    slope = 2 * float(lag @ weighted)
    density = float(covariance[0] + 2 * weighted.sum())
    # Neighbours with opposite deviations: single draws overestimate the spread, which is safe.
    if density <= 0:
        return 1
    cubed_length = 1.5 * count * (slope / density) ** 2
    length = round(cubed_length ** (1 / 3))
    return int(np.clip(length, 1, longest))


def _autocovariance(centred: Array, lags: int) -> Array:
    """Return the autocovariance of a centred series [N] at lag 0 to `lags`."""
    count = len(centred)
    spectrum = np.fft.rfft(centred, 2 * count)
    covariance: Array = np.fft.irfft(np.abs(spectrum) ** 2)[: lags + 1] / count
    return covariance


def _last_correlated_lag(correlation: Array, count: int, default: int) -> int:
    """Return the last lag before a run of insignificant correlations."""
    limit = 2 * math.sqrt(math.log10(count) / count)
    run = max(5, int(math.sqrt(math.log10(count))))
    insignificant = np.abs(correlation[1:]) < limit
    for lag in range(len(insignificant) - run + 1):
        if insignificant[lag : lag + run].all():
            return lag
    return default


class _Pool:
    """All values in ascending order, and the group of each value."""

    def __init__(self, groups: Sequence[ArrayLike]) -> None:
        values = [np.empty(0)]
        sizes: list[int] = []
        # Means of the groups that have values, in the order of time.
        means: list[float] = []
        for group in groups:
            array = np.atleast_1d(np.asarray(group, dtype=float))
            values.append(array)
            sizes.append(len(array))
            if len(array):
                means.append(array.mean())
        joined = np.concatenate(values)
        owners = np.repeat(np.arange(len(sizes)), sizes)
        order = np.argsort(joined, kind="stable")
        self.values = joined[order]
        self.means = np.array(means)
        self._owners = owners[order]
        # Each group once: the sample itself.
        self.once = np.ones(len(sizes), dtype=np.int64)

    def figures(self, counts: Counts) -> Array:
        """Return mean and percentiles of the resample that has group i `counts[i]` times."""
        weights = counts[self._owners]
        cumulative = weights.cumsum()
        total = int(cumulative[-1])
        if not total:
            return np.full(len(NAMES), np.nan)
        mean = weights @ self.values / total
        position = (total - 1) * np.array(PERCENTILES) / 100
        below = np.floor(position)
        above = np.minimum(below + 1, total - 1)
        low = self.values[np.searchsorted(cumulative, below, side="right")]
        high = self.values[np.searchsorted(cumulative, above, side="right")]
        percentiles = low + (high - low) * (position - below)
        return np.concatenate([[mean], percentiles])


def _replicates(figures: Callable[[Counts], Array], groups: int, length: int, seed: int) -> Array:
    """Return `figures` of each resample, [replicates, ...]."""
    return np.array([figures(counts) for counts in _resamples(groups, length, seed)])


def _resamples(groups: int, length: int, seed: int) -> Iterator[Counts]:
    """Yield the number of draws of each group [groups], from circular blocks of `length`."""
    generator = np.random.default_rng(seed)
    blocks = math.ceil(groups / length)
    affordable = MAX_DRAWS // max(1, groups)
    replicates = int(np.clip(affordable, MIN_REPLICATES, REPLICATES))
    for _ in range(replicates):
        starts = generator.integers(0, groups, blocks)
        drawn = starts[:, None] + np.arange(length)
        indices = drawn.ravel()[:groups] % groups
        yield np.bincount(indices, minlength=groups)


def _independent_groups(groups: int, length: int) -> float:
    """Return the approximate number of independent requests that the groups are worth."""
    return min(groups, 2 * groups / length)


def _estimate(value: float, replicates: Array) -> IntervalEstimate:
    finite = replicates[np.isfinite(replicates)]
    if not finite.size:
        return IntervalEstimate(value, math.nan, math.nan)
    low, high = np.quantile(finite, [TAIL, 1 - TAIL])
    return IntervalEstimate(value, float(low), float(high))


def _figure_estimates(
    figures: Array, replicates: Array, independent: float
) -> dict[str, IntervalEstimate]:
    result = {}
    for name, value, column in zip(NAMES, figures, replicates.T, strict=True):
        # Every resample of a single request equals it: its spread is unknown, not zero.
        usable = column if independent > 1 else column[:0]
        estimate = _estimate(float(value), usable)
        if not _upper_end_observed(name, independent):
            estimate = IntervalEstimate(estimate.value, estimate.low, math.nan)
        result[name] = estimate
    return result


def _upper_end_observed(name: str, independent: float) -> bool:
    """Return True if the largest of `independent` values lies above the percentile (97.5%)."""
    if name == "mean":
        return True
    quantile = int(name.removeprefix("p")) / 100
    return bool(quantile**independent <= TAIL)
