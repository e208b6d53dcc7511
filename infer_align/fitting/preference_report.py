"""Measure a reward on held-out preference pairs.

Accuracy has an interval of 95 % from a bootstrap over prompts: pairs of one prompt are alike, and
count as one draw. An accuracy that "the shorter answer wins" reaches too says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from infer_align.diagnostics.calibration import Calibration, calibration
from infer_align.diagnostics.pairs import have_same_length, wins
from infer_align.diagnostics.statistics import correlation
from infer_align.types import Array

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class PairAccuracy:
    """A share of right pairs, ties counting half, and its interval of 95 %.

    All three are NaN if there are no pairs.
    """

    value: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True, slots=True)
class HeldOutReport:
    """The quality of an ensemble on pairs that it was not fitted to.

    Attributes:
        accuracy: of the mean over the members.
        length_matched: the same on pairs whose answers have about the same length.
        shorter_wins: the accuracy of "the shorter answer wins" on the same pairs.
        members: the accuracy of each member alone.
        disagreement: share of the pairs on which the members do not all choose the same answer.
        member_correlation: mean correlation of the margins of two members; NaN for one member.
        length_correlation: correlation of the margin with the difference of log lengths.
        calibration: predicted against true probabilities, with the expected calibration error.
    """

    accuracy: PairAccuracy
    length_matched: PairAccuracy
    shorter_wins: PairAccuracy
    members: tuple[float, ...]
    disagreement: float
    member_correlation: float
    length_correlation: float
    calibration: Calibration


def held_out_report(
    margins: Array, lengths: Sequence[tuple[int, int]], prompts: ArrayLike
) -> HeldOutReport:
    """Measure an ensemble.

    Args:
        margins: [K, C], the score of the chosen minus that of the rejected answer, in log-odds.
        lengths: of each pair, the characters of the chosen and of the rejected answer.
        prompts: [C], equal numbers for pairs of one prompt.
    """
    groups = np.asarray(prompts)
    mean = margins.mean(axis=0)
    chosen, rejected = np.array(lengths, dtype=np.float64).reshape(-1, 2).T
    same = have_same_length(chosen, rejected)
    favours = margins > 0
    disagreement = np.mean(favours.any(axis=0) & ~favours.all(axis=0)) if len(mean) else np.nan
    return HeldOutReport(
        accuracy=accuracy(mean, groups),
        length_matched=accuracy(mean[same], groups[same]),
        shorter_wins=accuracy(rejected - chosen, groups),
        members=tuple(float(wins(row).mean()) for row in margins),
        disagreement=float(disagreement),
        member_correlation=_member_correlation(margins),
        length_correlation=_two_way_correlation(mean, np.log1p(chosen) - np.log1p(rejected)),
        calibration=calibration(mean),
    )


def accuracy(margins: Array, prompts: ArrayLike) -> PairAccuracy:
    """Return the share of positive margins, with a bootstrap over prompts."""
    if not len(margins):
        return PairAccuracy(np.nan, np.nan, np.nan, 0)
    _, positions = np.unique(np.asarray(prompts), return_inverse=True)
    right = wins(margins)
    sums = np.bincount(positions, weights=right)
    counts = np.bincount(positions).astype(np.float64)
    random = np.random.default_rng(0)
    drawn = random.integers(0, len(sums), (RESAMPLES, len(sums)))
    shares = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(shares, INTERVAL)
    return PairAccuracy(float(right.mean()), float(low), float(high), len(right))


def _two_way_correlation(margins: Array, differences: Array) -> float:
    """Return the correlation over both orders of each pair: which answer is first says nothing."""
    both = np.concatenate([margins, -margins])
    return correlation(both, np.concatenate([differences, -differences]))


def _member_correlation(margins: Array) -> float:
    correlations: list[float] = []
    for first in range(len(margins)):
        for second in range(first):
            correlations.append(_two_way_correlation(margins[first], margins[second]))
    return float(np.mean(correlations)) if correlations else float("nan")
