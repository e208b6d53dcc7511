"""Select from scores: several rewards without a sum, lotteries over one, length, consensus.

In shapes, N is the number of candidates, R of rewards, and G of groups of users with one reward
each. A NaN score is never a 0 and never wins: its candidate is no rival and is not chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from infer_align.objectives import spread
from infer_align.types import Array
from infer_align.words import words_of


def maxmin(utilities: ArrayLike, regret: bool = False) -> int | None:  # noqa: FBT001, FBT002
    """Return the candidate that is best for the group that it serves worst: [G, N] -> index.

    With `regret`, a group's regret is its best score minus its score of the candidate, and the
    candidate whose largest regret is smallest wins. Candidates with equal worst groups are compared
    by the second worst, and so on; then the lowest index wins. A candidate with a NaN is not
    chosen; None if there is no other.

    Source: Chakraborty et al. (2402.08925).

    Raises:
        ValueError: utilities are not [G, N].
    """
    ranked = maxmin_order(utilities, regret=regret)
    return ranked[0] if ranked else None


def maxmin_order(utilities: ArrayLike, *, regret: bool) -> tuple[int, ...]:
    """Return the candidates of `maxmin` in order, best first, without those that have a NaN.

    Args:
        utilities: [G, N] the score of each candidate for each group.
        regret: True to compare each group with its own best candidate.

    Raises:
        ValueError: utilities are not [G, N].
    """
    groups = np.asarray(utilities, dtype=np.float64)
    if groups.ndim != 2:
        raise ValueError(f"utilities: shape {groups.shape} is not allowed; must be [G, N].")
    has_nan = np.isnan(groups).any(axis=0)
    compared = np.flatnonzero(~has_nan)
    rows = groups[:, compared]
    if regret and rows.size:
        # The difference of two finite numbers can overflow. That of their quarters cannot.
        rows = -_below_best(rows / 4)
    # One row per candidate: its score for the group that it serves worst, then the second worst,
    # and so on. Tuples are compared from the left, so the worst groups decide first.
    worst_first = np.sort(rows, axis=0).T
    order = sorted(range(len(compared)), key=lambda i: tuple(-worst_first[i]))
    return tuple(int(compared[i]) for i in order)


def lexicographic(scores: ArrayLike, margins: ArrayLike) -> Array:
    """Return how many others each candidate beats: [R, N], [R] -> [N] pairwise wins.

    Rewards stand in the order of their importance. The first one in which two candidates differ by
    more than its margin decides between them; if none does, nobody wins. Margins are in standard
    deviations of the reward over the candidates. A candidate with a NaN gives NaN and is no rival.
    Infinite scores are compared, but do not count in the deviation.

    Source: "HERON" (2306.00186).

    Raises:
        ValueError: the shapes do not fit together, or a margin is negative or NaN.
    """
    rewards = np.asarray(scores, dtype=np.float64)
    widths = np.asarray(margins, dtype=np.float64)
    has_shape = rewards.ndim == 2 and widths.shape == rewards.shape[:1]
    if not has_shape or not (widths >= 0).all():
        raise ValueError(
            f"scores {rewards.shape} and margins {widths.shape}: must be [R, N] and [R], margins "
            "at least 0."
        )
    missing = np.isnan(rewards).any(axis=0)
    # The difference of two finite numbers can overflow. That of their quarters cannot.
    rows = np.where(missing, np.nan, rewards) / 4
    n = rows.shape[1]
    # The rewards decide in their order, each one only the pairs that are still open.
    outcomes = np.zeros((n, n))
    for row, width in zip(rows, widths, strict=True):
        is_open = outcomes == 0
        outcomes = np.where(is_open, _outcomes(row, width), outcomes)
    wins = (outcomes > 0).sum(axis=1)
    return np.asarray(np.where(missing, np.nan, wins))


def _outcomes(row: Array, margin: float) -> Array:
    """Compare each pair of candidates by one reward: [N] -> [N, N].

    The result is 1 where the row's candidate beats the column's, -1 where it loses, and 0 where the
    two differ by no more than `margin` standard deviations.
    """
    with np.errstate(invalid="ignore"):
        # The difference of two equal infinities is NaN: they do not differ.
        difference = np.nan_to_num(row[:, None] - row[None, :], nan=0.0, posinf=np.inf)
        # An infinite margin of equal scores is NaN, and nothing is larger than NaN.
        is_decided = np.abs(difference) > margin * spread(row)
    return np.where(is_decided, np.sign(difference), 0.0)


def pessimistic(scores: ArrayLike, beta: float) -> Array:
    """Return the lottery of chi-squared pessimism: [N] -> [N] probabilities.

    Candidate i gets relu(score_i - level) / (beta N), with the level at which this sums to 1. The
    larger beta, the more candidates share the probability, so a candidate that only seems best
    cannot take it all. A NaN gets 0 and does not count in N; all are 0 if nothing was scored.

    Source: Huang et al. (2503.21878).

    Raises:
        ValueError: scores are not [N], or beta is not over 0.
    """
    gaps = _gaps(scores, beta)
    scored = np.flatnonzero(~np.isnan(gaps))
    lottery = np.zeros(len(gaps))
    if not len(scored):
        return lottery
    n = len(scored)
    descending = np.sort(gaps[scored])[::-1]
    # A candidate more than N betas below the best never gets a share. The bound keeps the sums of
    # very low scores finite.
    sums = np.cumsum(np.maximum(descending, -n - 1.0))
    # levels[m - 1] is the level if exactly the m best candidates got a share:
    # sum of (gap_i - level) over them = N.
    levels = (sums - n) / np.arange(1, n + 1)
    # A candidate gets a share if it is above the level that it would bring about itself.
    winners = int((descending > levels).sum())
    share = np.maximum(gaps[scored] - levels[winners - 1], 0.0)
    lottery[scored] = share / share.sum()
    return lottery


def tilted(scores: ArrayLike, beta: float) -> Array:
    """Return softmax(scores / beta): [N] -> [N] probabilities.

    This is the first answer of statistical rejection sampling. A NaN gets 0; all are 0 if nothing
    was scored.

    Source: Liu et al. (2309.06657).

    Raises:
        ValueError: scores are not [N], or beta is not over 0.
    """
    gaps = _gaps(scores, beta)
    exponents = np.where(np.isnan(gaps), -np.inf, gaps)
    weights = np.exp(exponents)
    total = weights.sum()
    if total == 0:
        return np.asarray(weights)
    return np.asarray(weights / total)


def shortest(scores: ArrayLike, lengths: ArrayLike, within: float) -> int | None:
    """Return the shortest candidate near the best one: [N], [N] -> index.

    Near means at most `within` below the highest score. Of equally short ones the higher score
    wins, then the lower index. A NaN score or length is not chosen; None if there is no other.

    Raises:
        ValueError: the shapes do not fit together, or `within` is negative or NaN.
    """
    values = np.asarray(scores, dtype=np.float64)
    sizes = np.asarray(lengths, dtype=np.float64)
    if values.ndim != 1 or values.shape != sizes.shape or not within >= 0:
        raise ValueError(
            f"scores {values.shape}, lengths {sizes.shape}, within {within}: must be [N], [N] and "
            "at least 0."
        )
    is_compared = ~np.isnan(values) & ~np.isnan(sizes)
    if not is_compared.any():
        return None
    lowest = values[is_compared].max() - within
    near = np.flatnonzero(is_compared & (values >= lowest))
    return int(min(near.tolist(), key=lambda i: (sizes[i], -values[i], i)))


def consensus(similarities: ArrayLike) -> Array:
    """Return the mean similarity of each candidate to the others: [N, N] -> [N].

    The candidate with the highest mean is the minimum Bayes risk answer. The diagonal is not read.
    NaN is ignored; a candidate without any similarity gives NaN, so a single candidate does too.

    Raises:
        ValueError: similarities are not [N, N].
    """
    matrix = np.array(similarities, dtype=np.float64)
    if matrix.size == 0:
        return np.zeros(0)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"similarities: shape {matrix.shape} is not allowed; must be [N, N].")
    return mean_of_others(matrix)


def mean_of_others(matrix: Array) -> Array:
    """Return the mean of each row without its diagonal element and without NaN: [N, N] -> [N].

    A row without any other number gives NaN.
    """
    rivals = matrix.copy()
    np.fill_diagonal(rivals, np.nan)
    present = ~np.isnan(rivals)
    counts = present.sum(axis=1).astype(np.float64)
    counts[counts == 0] = np.nan
    # Sorted, so that the rounding of sums does not depend on the order of the candidates.
    totals = np.sort(np.where(present, rivals, 0.0), axis=1).sum(axis=1)
    return np.asarray(totals / counts)


def overlap(texts: Sequence[str]) -> Array:
    """Return the overlap of the words of each pair of texts: N texts -> [N, N] from 0 to 1.

    It is the F1 score of the words that two texts share, without case and punctuation (ROUGE-1).
    A text without words shares none, not even with another one of its kind.
    """
    counts = [Counter(words_of(text)) for text in texts]
    sizes = [count.total() for count in counts]
    matrix = np.ones((len(texts), len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            shared = (counts[i] & counts[j]).total()
            total = sizes[i] + sizes[j]
            similarity = 2 * shared / total if total else 0.0
            matrix[i, j] = similarity
            matrix[j, i] = similarity
    return matrix


def _gaps(scores: ArrayLike, beta: float) -> Array:
    """Return (score - best) / beta of each candidate: [N] -> [N], at most 0; NaN stays NaN.

    Raises:
        ValueError: scores are not [N], or beta is not over 0.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not beta > 0:
        raise ValueError(f"scores {values.shape}, beta {beta}: must be [N], and beta over 0.")
    if np.isnan(values).all():
        return values.copy()
    with np.errstate(over="ignore"):
        (below,) = _below_best(values[None])
        return np.asarray(-below / beta)


def _below_best(rows: Array) -> Array:
    """Return how far each score is below the best of its row; two equal infinities are 0 apart."""
    best = np.nanmax(rows, axis=1, keepdims=True)
    with np.errstate(invalid="ignore", over="ignore"):
        below = best - rows
    return np.asarray(np.where(rows == best, 0.0, below))
