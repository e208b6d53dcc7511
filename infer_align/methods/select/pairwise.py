"""Select from the probabilities with which candidates beat each other.

All functions take P, [N, N]: P_ij is the probability that candidate i is better than candidate j,
and P_ij + P_ji = 1. The diagonal is not read. NaN marks a pair that was not compared; a candidate
without any comparison is no rival and is never chosen. In shapes, N is the number of candidates
and R of rewards.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import null_space
from scipy.optimize import linprog, nnls

from infer_align.methods.select.scores import mean_of_others
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
    return mean_of_others(_probabilities(p))


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
    rivals = np.flatnonzero(_compared(matrix))
    # NaN > 0.5 is False: a pair that was not compared is no win.
    beats = matrix > 0.5
    wins = beats[:, rivals].sum(axis=1)
    for candidate in rivals.tolist():
        if wins[candidate] == len(rivals) - 1:
            return int(candidate)
    return None


def cycles(p: ArrayLike) -> int:
    """Return the number of triples in which i beats j, j beats k, and k beats i: [N, N].

    Raises:
        ValueError: P is not a matrix of win probabilities.
    """
    beats = (_probabilities(p) > 0.5).astype(np.int64)
    np.fill_diagonal(beats, 0)
    # Entry (i, i) of the third power is the number of ways i -> j -> k -> i. So each cycle is
    # counted from each of its three candidates.
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
    # [R, N, N]: 1 where the reward prefers i to j, 0 where it prefers j, 1/2 where both are equal.
    votes = np.full(np.broadcast_shapes(first.shape, second.shape), 0.5)
    votes[first > second] = 1.0
    votes[first < second] = 0.0
    votes[np.isnan(first) | np.isnan(second)] = np.nan
    return weighted_mean(votes, shares)


def weighted_mean(matrices: Array, weights: Array) -> Array:
    """Return the mean of matrices of win probabilities: [R, N, N], [R] -> [N, N].

    NaN is ignored; a pair that no matrix has is NaN. The diagonal is 1/2.
    """
    present = ~np.isnan(matrices)
    # The weights of the matrices that have a pair.
    shares = np.where(present, weights[:, None, None], 0.0)
    total = shares.sum(axis=0)
    weighted = np.where(present, matrices, 0.0) * shares
    mean = np.full(total.shape, np.nan)
    np.divide(weighted.sum(axis=0), total, out=mean, where=total > 0)
    np.fill_diagonal(mean, 0.5)
    return np.asarray(mean)


def _probabilities(p: ArrayLike) -> Array:
    """Return a copy of P as a matrix with 1/2 on its diagonal, checked.

    Raises:
        ValueError: P is not [N, N], or holds other numbers than win probabilities.
    """
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
    # A pair that was not compared is a tie: nobody has an advantage.
    advantage = np.nan_to_num(matrix - 0.5, nan=0.0)
    # Rounding of P must not break the symmetry.
    advantage = (advantage - advantage.T) / 2
    advantage[np.abs(advantage) < _TIE] = 0.0
    support = _support(advantage)
    inner = np.flatnonzero(support)
    outer = np.flatnonzero(~support)
    lottery = np.zeros(len(matrix))
    basis = null_space(advantage[np.ix_(inner, inner)], rcond=_TIE)
    if basis.shape[1]:
        lottery[inner] = _evenest(basis, advantage[np.ix_(inner, outer)])
    lottery = np.clip(lottery, 0.0, None)
    if lottery.sum() > 0:
        lottery /= lottery.sum()
        worst = (lottery @ advantage).min()
        if worst >= -_ACCURACY:
            return lottery
    # Rounding spoiled the evenest lottery. Any best one is better than a wrong one.
    return _any_best_lottery(advantage)


def _support(advantage: Array) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return [N]: True for candidates that some best lottery uses.

    Best lotteries form a cone if their sum is free. Then a linear program finds a member of the
    cone that is at least 1 wherever any member is positive.
    """
    n = len(advantage)
    # Variables: the member q >= 0, and z from 0 to 1. `linprog` minimises, so the sum of z has the
    # factor -1.
    costs = np.concatenate([np.zeros(n), -np.ones(n)])
    is_best = np.hstack([-advantage.T, np.zeros((n, n))])  # (q A)_j >= 0
    z_below_q = np.hstack([-np.eye(n), np.eye(n)])  # z_i <= q_i
    solution = linprog(
        costs,
        A_ub=np.vstack([is_best, z_below_q]),
        b_ub=np.zeros(2 * n),
        bounds=[(0, None)] * n + [(0, 1)] * n,
        method="highs",
    )
    if solution.x is None:
        return np.ones(n, dtype=np.bool_)
    z = solution.x[n:]
    return np.asarray(z > 0.5)


def _evenest(basis: Array, outer: Array) -> Array:
    """Return the point x of a subspace with sum 1 and least norm, x >= 0 and x @ outer >= 0.

    Args:
        basis: [S, D] orthonormal columns that span the subspace.
        outer: [S, T] the advantage of the S candidates of the support over the T others.
    """
    if basis.shape[1] == 1:
        return np.asarray(basis[:, 0] / basis.sum())
    # The point of least norm with sum 1, without the other two limits.
    totals = basis.sum(axis=0)
    start = basis @ totals / (totals @ totals)
    # Directions in the subspace that do not change the sum. The result is start + free @ w, and w
    # must keep the two limits: limits @ w >= bounds.
    free = basis @ null_space(totals[None])
    limits = np.concatenate([free, outer.T @ free])
    bounds = -np.concatenate([start, outer.T @ start])
    if (bounds <= _TIE).all():
        return np.asarray(start)
    # The shortest such w is "least distance programming" (Lawson and Hanson, "Solving Least Squares
    # Problems", chapter 23): with the residual r of this system, w = -r[:-1] / r[-1].
    system = np.concatenate([limits.T, bounds[None]])
    target = np.zeros(len(system))
    target[-1] = 1.0
    weights, _ = nnls(system, target, maxiter=100 * system.shape[1])
    residual = system @ weights - target
    return np.asarray(start - free @ residual[:-1] / residual[-1])


def _any_best_lottery(advantage: Array) -> Array:
    """Return a best lottery by the plain linear program: max v with q A >= v. [N, N] -> [N]."""
    n = len(advantage)
    # Variables: the lottery q >= 0 with sum 1, and its worst case v. `linprog` minimises, so v has
    # the factor -1.
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
