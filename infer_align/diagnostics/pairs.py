"""Compare the scores of two answers with which of them is the better one.

Pair accuracy alone says little where the better answers are also the longer ones: then a reward
that counts characters is right too. Its twin counts only pairs of about the same length.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infer_align.types import Array

# Two answers are of about the same length if the longer one is at most this share longer.
LENGTH_TOLERANCE = 0.1
# Two ratings differ if they are further apart than this share of the range of all ratings.
RATING_GAP = 0.05


def wins(differences: ArrayLike) -> Array:
    """Return 1 where the better answer scored higher, 0.5 for a tie, 0 where it scored lower.

    Args:
        differences: [P], the score of the better answer minus that of the other; NaN stays NaN.
    """
    numbers = np.asarray(differences, dtype=np.float64)
    return np.asarray((np.sign(numbers) + 1) / 2)


def have_same_length(
    first: ArrayLike, second: ArrayLike, tolerance: float = LENGTH_TOLERANCE
) -> NDArray[np.bool_]:
    """Return True for each two lengths of which one is at most (1 + tolerance) times the other.

    Args:
        first: [P] lengths, at least 0.
        second: [P] lengths.
        tolerance: 0 for equal lengths alone.
    """
    x = np.asarray(first, dtype=np.float64)
    y = np.asarray(second, dtype=np.float64)
    return np.asarray(np.maximum(x, y) <= (1 + tolerance) * np.minimum(x, y))


def rated_pairs(ratings: ArrayLike, gap: float) -> NDArray[np.int64]:
    """Return every two answers whose ratings differ by more than a gap: [P, 2], better one first.

    Args:
        ratings: [N] of one prompt; answers that are NaN form no pairs.
        gap: in units of the ratings, at least 0.
    """
    numbers = np.asarray(ratings, dtype=np.float64)
    better, worse = np.nonzero(numbers[:, None] - numbers[None, :] > gap)
    return np.stack([better, worse], axis=1).astype(np.int64)
