"""From choices to weights of rewards whose scales differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infer_align.profiles.bradley_terry import fit
from infer_align.types import Array

# Differences up to this are rounding of the scores: they say nothing.
NO_SPREAD = 1e-6
# A weight that keeps its sign keeps this share of its size: if all weights were 0, nothing could be
# compared.
LEFT_OVER = 0.01
# The largest spread that the weight to start from can give an estimated one.
LARGEST_SPREAD = 1e9


@dataclass(frozen=True, slots=True)
class Learned:
    """The weights of T terms, in the units of their scores. NaN means not known."""

    weights: Array  # [T], within the bounds
    deviations: Array  # [T] standard deviations of the weights; NaN without a spread
    low: Array  # [T] bounds; NaN without a spread
    high: Array  # [T]
    # Of the scores divided by their spreads. A term without a spread has the spread 1 here.
    spreads: Array  # [T]
    strengths: Array  # [T] weights of the divided scores; those of the prior have length 1
    changes: Array  # [T] the strengths minus those of the prior, before the bounds
    covariance: Array  # [T, T] of the strengths
    choices: int  # that taught something


def spreads_of(differences: Array, configured: Sequence[float | None], prior: Array) -> Array:
    """Return the standard deviation of each term between two answers; 0 if they do not differ.

    Args:
        differences: [C, T] chosen minus rejected; NaN is left out.
        configured: [T] spreads of the configuration, or None.
        prior: [T] weights to start from. A few choices may underrate a spread, and its reward would
            then get an enormous weight. So an estimated spread is never below the one for which
            the weight to start from would be the whole of the sum.
    """
    finite = np.where(np.isfinite(differences), differences, np.nan)
    spreads = np.zeros(len(configured))
    for t, spread in enumerate(configured):
        column = finite[:, t][~np.isnan(finite[:, t])]
        if spread is not None:
            spreads[t] = spread
        elif len(column):
            spreads[t] = _spread(column)
    length = math.hypot(*(prior * spreads))
    for t, spread in enumerate(configured):
        if spread is None and spreads[t] and prior[t]:
            # A weight that is nothing beside the others must not make its spread infinite.
            weight = max(abs(prior[t]), length / LARGEST_SPREAD)
            spreads[t] = max(spreads[t], length / weight)
    return spreads


def _spread(differences: Array) -> float:
    """Return the standard deviation of one answer from differences of two: [C] -> number."""
    largest = float(np.abs(differences).max())
    if largest <= NO_SPREAD:
        return 0.0
    # The difference of two independent answers has twice the variance of one.
    return largest * float(np.sqrt(((differences / largest) ** 2).mean() / 2))


def learn(
    differences: Array,
    prior: Array,
    spreads: Array,
    *,
    deviation: float,
    bound: float,
    keeps_sign: NDArray[np.bool_] | None = None,
) -> Learned:
    """Learn the weights of T terms from C choices.

    The scores are divided by their spreads first, so that no reward counts more for its scale. In
    those units the prior weights are scaled to length 1, which leaves every ranking as it is. The
    learnt weights are scaled back: without choices they are the prior ones.

    Args:
        differences: [C, T] chosen minus rejected. A row with a NaN is left out.
        prior: [T] weights to start from.
        spreads: [T] from `spreads_of`. A weight without a spread stays as it is.
        deviation: prior standard deviation of the divided weights.
        bound: largest absolute value of the divided weights, or that of the prior if it is larger.
        keeps_sign: [T] True for a weight that may not change its sign. One that starts at 0 has
            none to keep. Default: none keeps it.
    """
    has_spread = spreads > 0
    divisor = np.where(has_spread, spreads, 1.0)
    start = np.where(has_spread, prior * divisor, 0.0)
    length = math.hypot(*start) or 1.0
    start = start / length
    rows = np.where(has_spread, differences / divisor, 0.0)
    rows = np.where(np.isfinite(differences), rows, np.nan)
    strengths, covariance = fit(rows, start, deviation**2 * np.diag(has_spread.astype(float)))
    changes = strengths - start
    high = np.maximum(bound, np.abs(start))
    low = -high
    if keeps_sign is not None:
        low = np.where(keeps_sign & (start > 0), LEFT_OVER * start, low)
        high = np.where(keeps_sign & (start < 0), LEFT_OVER * start, high)
    strengths = np.clip(strengths, low, high)
    unit = length / divisor
    unknown = np.where(has_spread, unit, np.nan)
    return Learned(
        weights=np.where(has_spread, strengths * unit, prior),
        deviations=np.sqrt(np.clip(np.diag(covariance), 0.0, None)) * unknown,
        low=low * unknown,
        high=high * unknown,
        spreads=divisor,
        strengths=strengths,
        changes=changes,
        covariance=covariance,
        choices=int(np.isfinite(rows).all(axis=1).sum()),
    )
