"""Estimate means and correlations over prompts, with standard errors.

Answers to one prompt are not independent: they share its difficulty and its topic. The standard
errors therefore count prompts and not answers.

Source of the clustered errors: Liang and Zeger, "Longitudinal data analysis using generalized
linear models" (1986); for evaluations of language models Miller, "Adding Error Bars to Evals"
(2411.00640), section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from infer_align.objectives import standard_scores
from infer_align.types import Array


@dataclass(frozen=True, slots=True)
class Statistic:
    """A figure and its standard error, which is NaN where a single prompt was measured."""

    value: float
    error: float
    count: int  # of observations
    prompts: int

    @property
    def is_measured(self) -> bool:
        """Return True if there is a figure."""
        return math.isfinite(self.value)

    def exceeds(self, bound: float, errors: float = 2.0) -> bool:
        """Return True if the figure is over a bound by more than this many standard errors."""
        return self.value - bound > errors * self.error

    def is_below(self, bound: float, errors: float = 2.0) -> bool:
        """Return True if the figure is under a bound by more than this many standard errors."""
        return bound - self.value > errors * self.error


UNMEASURED = Statistic(math.nan, math.nan, 0, 0)


def clustered_mean(values: ArrayLike, prompts: ArrayLike) -> Statistic:
    """Return the mean of all values, with the standard error of values that share prompts.

    With G prompts, N values and the residual sums s_g of each prompt, the squared error is
    G / (G - 1) * sum s_g^2 / N^2.

    Args:
        values: [N]; NaN values are left out.
        prompts: [N], the number of the prompt of each value.

    Raises:
        ValueError: the shapes differ.
    """
    numbers = np.asarray(values, dtype=np.float64)
    owners = np.asarray(prompts)
    if numbers.shape != owners.shape or numbers.ndim != 1:
        raise ValueError(
            f"values and prompts: shapes {numbers.shape} and {owners.shape} are not allowed; both "
            "must be [N]."
        )
    present = ~np.isnan(numbers)
    numbers = numbers[present]
    if not len(numbers):
        return UNMEASURED
    _, cluster = np.unique(owners[present], return_inverse=True)
    clusters = int(cluster.max()) + 1
    mean = float(numbers.mean())
    error = math.nan
    if clusters > 1:
        sums = np.bincount(cluster, weights=numbers - mean)
        variance = clusters / (clusters - 1) * float(sums @ sums)
        error = math.sqrt(variance) / len(numbers)
    return Statistic(mean, error, len(numbers), clusters)


def mean_over_prompts(values: ArrayLike) -> Statistic:
    """Return the mean of one value per prompt: [G]. NaN values are left out."""
    numbers = np.asarray(values, dtype=np.float64)
    return clustered_mean(numbers, np.arange(len(numbers)))


def correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Return Pearson's correlation of two rows [N], -1 to 1.

    Positions where one of them is not finite do not count. It is NaN where fewer than two positions
    remain, or where one of the rows is constant.
    """
    x = np.asarray(first, dtype=np.float64)
    y = np.asarray(second, dtype=np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    if finite.sum() < 2:
        return math.nan
    x = standard_scores(x[finite])
    y = standard_scores(y[finite])
    if not x.any() or not y.any():
        return math.nan
    return float(np.clip((x * y).mean(), -1.0, 1.0))


def within_prompts(first: Sequence[ArrayLike], second: Sequence[ArrayLike]) -> Statistic:
    """Return the correlation within a prompt, as the mean over prompts.

    Where each prompt has two answers, a correlation is 1 or -1, and the mean is twice the share of
    prompts that agree, minus 1.

    Args:
        first: G rows [N_g].
        second: rows of the same lengths.
    """
    rows = zip(first, second, strict=True)
    return mean_over_prompts([correlation(x, y) for x, y in rows])


def member_correlations(members: Sequence[ArrayLike]) -> Array:
    """Return the correlation of each two members within a prompt, as means over prompts: [K, K].

    Members that agree add nothing to each other: the worst case of K equal members is one member.

    Args:
        members: per prompt, [K, N_g] scores.
    """
    return _correlations([np.asarray(scores, dtype=np.float64) for scores in members])


def error_correlations(members: Sequence[ArrayLike], gold: Sequence[ArrayLike]) -> Array:
    """Return the correlation of each two members after gold is removed from both: [K, K].

    It is the partial correlation within a prompt. Members of which both are good agree because of
    the gold; an ensemble helps as far as their errors differ.

    Args:
        members: per prompt, [K, N_g] scores.
        gold: per prompt, [N_g].
    """
    residuals: list[Array] = []
    for scores, judged in zip(members, gold, strict=True):
        residuals.append(_residuals(np.asarray(scores, np.float64), np.asarray(judged, np.float64)))
    return _correlations(residuals)


def _residuals(scores: Array, gold: Array) -> Array:
    """Return what a line through the gold leaves of each member: [K, N] -> [K, N]."""
    residuals = np.full_like(scores, np.nan)
    for row, member in enumerate(scores):
        finite = np.isfinite(member) & np.isfinite(gold)
        if finite.sum() < 3:
            continue
        z = standard_scores(member[finite])
        g = standard_scores(gold[finite])
        residual = z - (z * g).mean() * g
        # A member that follows gold exactly has no errors; the rest is rounding.
        residual[np.abs(residual) < 1e-9] = 0.0
        residuals[row, finite] = residual
    return residuals


def _correlations(rows: Sequence[Array]) -> Array:
    """Return the mean over prompts of the correlation of each two rows, [K, K]."""
    size = len(rows[0]) if rows else 0
    table = np.full((size, size), np.nan)
    for i in range(size):
        for j in range(i, size):
            values = [correlation(scores[i], scores[j]) for scores in rows]
            table[i, j] = table[j, i] = mean_over_prompts(values).value
    return table
