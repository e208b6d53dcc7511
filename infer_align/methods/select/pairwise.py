"""Select from the probabilities with which candidates beat each other.

All functions take P, [N, N]: P_ij is the probability that candidate i is better than candidate j,
and P_ij + P_ji = 1. The diagonal is not read. NaN marks a pair that was not compared; a candidate
without any comparison is no rival and is never chosen.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import null_space
from scipy.optimize import linprog, nnls

from infer_align.types import Array

# A probability nearer to 1/2 than this is a tie for the linear program.
_TIE = 1e-9
# The accuracy that a solver must reach.
_ACCURACY = 1e-6


def win_rates(p: ArrayLike) -> Array:
    """Return the mean probability of each candidate to beat another one: [N, N] -> [N].

    Pairs that were not compared are ignored. A candidate without any comparison gives NaN, so a
    single candidate does too.

    Raises:
        ValueError: P is not a matrix of win probabilities.
    """
    matrix = _probabilities(p)
    np.fill_diagonal(matrix, np.nan)
    compared = ~np.isnan(matrix)
    # Sorted, so that the rounding of sums does not depend on the order of the candidates.
    totals = np.sort(np.where(compared, matrix, 0.0), axis=1).sum(axis=1)
    counts = compared.sum(axis=1).astype(np.float64)
    counts[counts == 0] = np.nan
    return np.asarray(totals / counts)


def condorcet(p: ArrayLike) -> int | None:
    """Return the candidate that beats every other one with probability > 1/2, or None: [N, N].

    A pair that was not compared is no win. Candidates without any comparison are no rivals. A
    single candidate beats all others, as there are none.

    Raises:
        ValueError: P is not a matrix of win probabilities.
    """
    matrix = _probabilities(p)
    if len(matrix) == 1:
        return 0
    rivals = _compared(matrix)
    # NaN > 0.5 is False: a pair that was not compared is no win.
    wins = (matrix > 0.5)[:, rivals].sum(axis=1)
    for i in np.flatnonzero(rivals).tolist():
        if wins[i] == rivals.sum() - 1:
            return int(i)
    return None


def cycles(p: ArrayLike) -> int:
    """Return the number of triples in which i beats j, j beats k, and k beats i: [N, N].

    Raises:
        ValueError: P is not a matrix of win probabilities.
    """
    beats = (_probabilities(p) > 0.5).astype(np.int64)
    np.fill_diagonal(beats, 0)
    # Each cycle is counted from each of its three candidates.
    return int(np.trace(beats @ beats @ beats)) // 3


def minimax_lottery(p: ArrayLike) -> Array:
    """Return the lottery with the best worst case: [N, N] -> [N] probabilities.

    The lottery q maximises min_j sum_i q_i P_ij, the probability to beat the rival that is worst
    for it. The best value is 1/2. Where a candidate beats every other one, the lottery is that
    candidate. Of several best lotteries it is the one that spreads most evenly (least squares), so
    it does not depend on the order of the candidates. A pair that was not compared counts as a tie.
    Without any comparison, a single candidate gets 1 and several get 0 each.

    Source: Swamy et al. (2401.04056). The support of all best lotteries is a linear program,
    because the game is symmetric and zero-sum.

    Raises:
        ValueError: P is not a matrix of win probabilities.
    """
    matrix = _probabilities(p)
    lottery = np.zeros(len(matrix))
    winner = condorcet(matrix)
    if winner is not None:
        lottery[winner] = 1.0
        return lottery
    rivals = np.flatnonzero(_compared(matrix))
    if len(rivals):
        lottery[rivals] = _best_lottery(matrix[np.ix_(rivals, rivals)])
    return lottery


def preferences(values: ArrayLike, weights: ArrayLike) -> Array:
    """Return the weighted share of rewards that prefer i to j: [R, N], [R] -> [N, N].

    An equal pair counts half for each. A reward that lacks one of the two scores is left out of
    that pair; the pair is NaN if no reward has both. The diagonal is 1/2.

    Raises:
        ValueError: the shapes do not fit together, or a weight is negative.
    """
    scores = np.asarray(values, dtype=np.float64)
    shares = np.asarray(weights, dtype=np.float64)
    if scores.ndim != 2 or shares.shape != scores.shape[:1] or not (shares >= 0).all():
        raise ValueError(
            f"values {scores.shape} and weights {shares.shape}: must be [R, N] and [R], weights at "
            "least 0."
        )
    first = scores[:, :, None]
    second = scores[:, None, :]
    votes = np.where(first > second, 1.0, np.where(first < second, 0.0, 0.5))
    votes = np.where(np.isnan(first) | np.isnan(second), np.nan, votes)
    return weighted_mean(votes, shares)


def weighted_mean(matrices: Array, weights: Array) -> Array:
    """Return the mean of matrices of win probabilities: [R, N, N], [R] -> [N, N].

    NaN is ignored; a pair that no matrix has is NaN. The diagonal is 1/2.
    """
    present = ~np.isnan(matrices)
    shares = np.where(present, weights[:, None, None], 0.0)
    total = shares.sum(axis=0)
    mixed = (np.where(present, matrices, 0.0) * shares).sum(axis=0)
    mean = np.divide(mixed, total, out=np.full(total.shape, np.nan), where=total > 0)
    np.fill_diagonal(mean, 0.5)
    return np.asarray(mean)


def _probabilities(p: ArrayLike) -> Array:
    """Return a copy of P as a matrix with 1/2 on its diagonal, checked."""
    matrix = np.array(p, dtype=np.float64)
    if matrix.size == 0:
        return np.zeros((0, 0))
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"p: shape {matrix.shape} is not allowed; must be [N, N].")
    np.fill_diagonal(matrix, 0.5)
    one_sided = np.isnan(matrix) != np.isnan(matrix.T)
    with np.errstate(invalid="ignore"):
        wrong = np.abs(matrix + matrix.T - 1.0) > _ACCURACY
        outside = (matrix < 0) | (matrix > 1)
    if one_sided.any() or wrong.any() or outside.any():
        raise ValueError("p: must hold probabilities from 0 to 1 with p[i, j] + p[j, i] = 1.")
    return matrix


def _compared(matrix: Array) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return [N]: True for candidates with at least one comparison."""
    pairs = ~np.isnan(matrix)
    pairs[np.diag_indices(len(pairs))] = False
    return np.asarray(pairs.any(axis=1))


def _best_lottery(matrix: Array) -> Array:
    """Return the evenest best lottery of the symmetric game: [N, N] -> [N].

    With A = P - 1/2, a lottery q is best if (q A)_j >= 0 for all j. On the union S of the supports
    of all best lotteries, each of them solves q A = 0.
    """
    advantage = np.nan_to_num(matrix - 0.5, nan=0.0)
    advantage = (advantage - advantage.T) / 2
    advantage[np.abs(advantage) < _TIE] = 0.0
    support = _support(advantage)
    inner = np.flatnonzero(support)
    lottery = np.zeros(len(matrix))
    basis = null_space(advantage[np.ix_(inner, inner)], rcond=_TIE)
    if basis.shape[1]:
        lottery[inner] = _evenest(basis, advantage[np.ix_(inner, np.flatnonzero(~support))])
    lottery = np.clip(lottery, 0.0, None)
    if lottery.sum() > 0:
        lottery /= lottery.sum()
        if (lottery @ advantage).min() >= -_ACCURACY:
            return lottery
    return _any_best_lottery(advantage)


def _support(advantage: Array) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return [N]: True for candidates that some best lottery uses.

    Best lotteries form a cone if their sum is free. Then a linear program finds a member of the
    cone that is at least 1 wherever any member is positive.
    """
    n = len(advantage)
    eye = np.eye(n)
    zeros = np.zeros((n, n))
    # Variables: q >= 0, and z from 0 to 1 with z <= q; maximise the sum of z.
    limits = np.block([[-advantage.T, zeros], [-eye, eye]])
    solution = linprog(
        np.concatenate([np.zeros(n), -np.ones(n)]),
        A_ub=limits,
        b_ub=np.zeros(2 * n),
        bounds=[(0, None)] * n + [(0, 1)] * n,
        method="highs",
    )
    if solution.x is None:
        return np.ones(n, dtype=np.bool_)
    return np.asarray(solution.x[n:] > 0.5)


def _evenest(basis: Array, outer: Array) -> Array:
    """Return the point x of a subspace with sum 1 and least norm, x >= 0 and x @ outer >= 0.

    Args:
        basis: [S, D] orthonormal columns.
        outer: [S, T].
    """
    if basis.shape[1] == 1:
        return np.asarray(basis[:, 0] / basis.sum())
    totals = basis.sum(axis=0)
    start = basis @ totals / (totals @ totals)
    # Directions in the subspace that do not change the sum.
    free = basis @ null_space(totals[None])
    limits = np.concatenate([free, outer.T @ free])
    bounds = -np.concatenate([start, outer.T @ start])
    if (bounds <= _TIE).all():
        return np.asarray(start)
    # Least distance programming (Lawson and Hanson, chapter 23): min |w| with limits w >= bounds.
    system = np.concatenate([limits.T, bounds[None]])
    target = np.zeros(len(system))
    target[-1] = 1.0
    weights, _ = nnls(system, target, maxiter=100 * system.shape[1])
    residual = system @ weights - target
    return np.asarray(start - free @ residual[:-1] / residual[-1])


def _any_best_lottery(advantage: Array) -> Array:
    """Return a best lottery by the plain linear program: max v with q A >= v."""
    n = len(advantage)
    solution = linprog(
        np.concatenate([np.zeros(n), [-1.0]]),
        A_ub=np.hstack([-advantage.T, np.ones((n, 1))]),
        b_ub=np.zeros(n),
        A_eq=np.concatenate([np.ones(n), [0.0]])[None],
        b_eq=[1.0],
        bounds=[(0, None)] * n + [(None, None)],
        method="highs",
    )
    lottery = np.clip(solution.x[:n], 0.0, None)
    return np.asarray(lottery / lottery.sum())
