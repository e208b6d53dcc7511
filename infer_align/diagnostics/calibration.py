"""Read the sigmoid of a score difference as the probability that people prefer the answer.

A Bradley-Terry reward says P(a beats b) = sigmoid(score(a) - score(b)). The scale s that makes
sigmoid(s * difference) right is fitted by maximum likelihood; it is 1 for a calibrated reward,
below 1 for one that is too sure of itself, and negative for one that prefers the worse answers.

Sources: Bradley and Terry, "Rank analysis of incomplete block designs" (1952); Guo et al., "On
Calibration of Modern Neural Networks" (1706.04599), for the scale (its inverse is the temperature)
and for the expected calibration error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from infer_align.diagnostics.pairs import wins
from infer_align.types import Array

BIN_WIDTH = 0.05
# Halvings of the interval of the scale: more than the bits of a double.
HALVINGS = 80


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """The pairs whose favourite has about the same predicted probability."""

    low: float  # of the predicted probability
    high: float
    predicted: float  # mean
    right: float  # share of the pairs whose favourite was preferred
    pairs: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """The quality of predicted probabilities of choices, at one scale."""

    scale: float
    # Mean distance of predicted and true share, weighted by the pairs of each bin; from 0 to 1.
    expected_error: float
    bins: tuple[CalibrationBin, ...]


def fit_scale(differences: ArrayLike) -> float:
    """Return the scale s that maximises the mean of log sigmoid(s * difference).

    The likelihood is concave in s, so there is one maximum.

    Args:
        differences: [P], the score of the preferred answer minus that of the other; NaN is left
            out.

    Returns:
        inf if no pair is wrong, -inf if none is right, NaN if all are ties or there are no pairs.
    """
    numbers = _finite(differences)
    if not numbers.any():
        return math.nan
    if (numbers >= 0).all():
        return math.inf
    if (numbers <= 0).all():
        return -math.inf
    unit = float(np.abs(numbers).max())
    scaled = numbers / unit

    # The slope of the likelihood falls from a positive value to a negative one.
    bound = 1.0
    while _slope(bound, scaled) > 0 or _slope(-bound, scaled) < 0:
        bound *= 2
    low, high = -bound, bound
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _slope(middle, scaled) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2 / unit


def _slope(scale: float, differences: Array) -> float:
    """Return the derivative of the sum of log sigmoid(scale * difference)."""
    return float(differences @ _sigmoid(-scale * differences))


def _sigmoid(values: Array) -> Array:
    """Return 1 / (1 + e^-x) without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0, -values)))


def calibration(differences: ArrayLike, scale: float = 1.0) -> Calibration:
    """Return the predicted and the true shares of right choices.

    The favourite of a pair is the answer with the higher predicted probability. Empty bins are left
    out.

    Args:
        differences: [P], the score of the preferred answer minus that of the other; NaN is left
            out.
        scale: multiplies the differences, finite.

    Raises:
        ValueError: the scale is not finite.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale: {scale} is not allowed; must be finite.")
    numbers = scale * _finite(differences)
    if not len(numbers):
        return Calibration(scale, math.nan, ())
    predicted = _sigmoid(np.abs(numbers))
    right = wins(numbers)
    count = round(0.5 / BIN_WIDTH)
    index = np.clip(((predicted - 0.5) / BIN_WIDTH).astype(np.int64), 0, count - 1)
    bins: list[CalibrationBin] = []
    error = 0.0
    for i in range(count):
        inside = index == i
        if not inside.any():
            continue
        entry = _bin(i, predicted[inside], right[inside])
        error += entry.pairs / len(numbers) * abs(entry.predicted - entry.right)
        bins.append(entry)
    return Calibration(scale, error, tuple(bins))


def _bin(index: int, predicted: Array, right: Array) -> CalibrationBin:
    low = round(0.5 + index * BIN_WIDTH, 6)
    high = round(low + BIN_WIDTH, 6)
    return CalibrationBin(low, high, float(predicted.mean()), float(right.mean()), len(right))


def _finite(differences: ArrayLike) -> Array:
    numbers = np.asarray(differences, dtype=np.float64)
    return numbers[np.isfinite(numbers)]
