"""Measure the distance of two rewards, whatever their offsets and scales.

Among the N answers to one prompt, an offset and a positive factor change no choice. The canonical
form takes both away: c(R) = R - mean(R), divided by its norm. The distance is half the norm of the
difference of two canonical forms: 0 if they are equal, 1 if they are opposite, and 1/2 between any
reward and a constant one. With Pearson's correlation r it is sqrt((1 - r) / 2).

Source: Skalse et al., "STARC: A General Framework For Quantifying Differences Between Reward
Functions" (2309.15257), definitions 1 and 2. The mean over the answers is the canonicalisation of a
problem with one step, whose reference policy draws the answers alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from infer_align.diagnostics.statistics import Statistic, mean_over_prompts
from infer_align.objectives import standard_scores
from infer_align.types import Array


def canonical(scores: ArrayLike) -> Array:
    """Return scores with mean 0 and norm 1: [N] -> [N]; constant scores become 0."""
    centred = standard_scores(scores)
    norm = float(np.linalg.norm(centred))
    return centred / norm if norm > 0 else centred


def reward_distance(first: ArrayLike, second: ArrayLike) -> float:
    """Return the distance of two rewards over the answers to one prompt, 0 to 1.

    Answers that one of them did not score are left out. It is NaN if fewer than two answers remain.

    Args:
        first: [N] scores.
        second: [N] scores of the same answers.
    """
    x = np.asarray(first, dtype=np.float64)
    y = np.asarray(second, dtype=np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    if finite.sum() < 2:
        return float("nan")
    return float(np.linalg.norm(canonical(x[finite]) - canonical(y[finite]))) / 2


def mean_distance(first: Sequence[ArrayLike], second: Sequence[ArrayLike]) -> Statistic:
    """Return the mean distance over prompts.

    Args:
        first: G rows [N_g] of scores.
        second: rows of the same lengths.
    """
    return mean_over_prompts([reward_distance(x, y) for x, y in zip(first, second, strict=True)])
