"""The Bradley-Terry model with a Gaussian prior: its posterior, and the next pair to compare.

A person who chooses between two answers prefers the first with probability sigmoid(w . d). Here d
is the difference of the answers' scores by R rewards, and w are the person's weights of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from infer_align.types import Array

# The scores of two answers count as at most this far apart: in prior standard deviations and in the
# mean of the margin together. The choice is certain long before, and its square cannot overflow.
MAX_LENGTH = 1e4
# The Newton iteration ends when the posterior can gain no more than this many nats.
TOLERANCE = 1e-18
MAX_STEPS = 200
MAX_HALVINGS = 60
# A step is taken if it gains this share of what the gradient promises.
SUFFICIENT_GAIN = 1e-4
# The prior covariance may be negative by this share of its largest eigenvalue: rounding.
ROUNDING = 1e-9


def fit(
    differences: ArrayLike, prior_mean: ArrayLike, prior_covariance: ArrayLike
) -> tuple[Array, Array]:
    """Return the weights that explain the choices best, and their covariance.

    The maximum of the posterior by Newton's method. A step that loses is halved until it gains:
    without that, the iteration diverges on choices that some weights explain without error. Those
    choices have a finite maximum too, thanks to the prior.

    Args:
        differences: [C, R] scores of the chosen minus those of the rejected answer, one row per
            choice. A row with a NaN or an infinite number is left out: it compares nothing. C may
            be 0, and the result is then the prior.
        prior_mean: [R].
        prior_covariance: [R, R], symmetric, without negative eigenvalues. A weight of variance 0
            stays as it is.

    Returns:
        The weights [R], and their covariance [R, R] by Laplace's approximation.

    Raises:
        ValueError: the shapes do not fit together, or the prior is not finite or no covariance.
    """
    mean, root = _prior(prior_mean, prior_covariance)
    rows = _rows(differences, len(mean))
    # The length of a row, in the unit of MAX_LENGTH.
    with np.errstate(over="ignore", invalid="ignore"):
        deviations = _norms(rows @ root)
        margins = np.abs(rows @ mean)
        length = np.hypot(deviations, margins)
    rows = rows * _shrinkage(rows, length)[:, None]
    # In the coordinates z of weights = mean + root z, the prior is Normal(0, I), and the margin
    # w . d of a row is offset + design z.
    offset = rows @ mean
    design = rows @ root
    z = _minimise_loss(offset, design)
    inverse = np.linalg.inv(_curvature(z, offset, design))
    covariance = root @ inverse @ root.T
    # Rounding can leave it a little asymmetric.
    return mean + root @ z, (covariance + covariance.T) / 2


def next_question(candidates: ArrayLike, mean: ArrayLike, covariance: ArrayLike) -> tuple[int, int]:
    """Return the pair of candidates whose comparison says most about the weights.

    With d the difference of their scores, S the covariance and p = sigmoid(mean . d), it is the
    pair with the largest p (1 - p) (d . S d): its outcome is open, and the weights decide it.

    Args:
        candidates: [N, R] scores. A candidate with a NaN or an infinite score is never asked about.
        mean: [R] weights.
        covariance: [R, R] of the weights.

    Returns:
        (i, j) with i < j; the first such pair if several are equal.

    Raises:
        ValueError: the shapes do not fit together, or fewer than two candidates have all scores.
    """
    weights, root = _prior(mean, covariance)
    scores = _matrix(candidates, len(weights), "candidates", "N")
    usable = np.flatnonzero(np.isfinite(scores).all(axis=1))
    if len(usable) < 2:
        raise ValueError(
            f"candidates: {len(usable)} of {len(scores)} have all their scores; a question needs "
            "two."
        )
    best_pair = (int(usable[0]), int(usable[1]))
    best_gain = -1.0
    # One candidate with all later ones at a time, so that N candidates take no N^2 rows of memory.
    for position, i in enumerate(usable[:-1].tolist()):
        later = usable[position + 1 :]
        gains = _information(scores[i] - scores[later], weights, root)
        k = int(np.argmax(gains))
        if gains[k] > best_gain:
            best_gain = float(gains[k])
            best_pair = (i, int(later[k]))
    return best_pair


def _information(rows: Array, mean: Array, root: Array) -> Array:
    """Return p (1 - p) (d . S d) of each row d: [N, R] -> [N]."""
    with np.errstate(over="ignore", invalid="ignore"):
        margin = rows @ mean
        outcome_deviation = np.sqrt(expit(margin) * expit(-margin))
        # Multiplied in this order, a certain outcome of a huge difference is 0 and not 0 times
        # infinity.
        deviation = outcome_deviation[:, None] * (rows @ root)
        gains = (deviation**2).sum(axis=1)
    return np.asarray(np.nan_to_num(gains, nan=0.0))


def _prior(mean: ArrayLike, covariance: ArrayLike) -> tuple[Array, Array]:
    """Return the mean [R] and a root of the covariance: root @ root.T is the covariance.

    Raises:
        ValueError: the shapes do not fit, or it is not the covariance of finite weights.
    """
    center = np.asarray(mean, dtype=np.float64)
    spread = np.asarray(covariance, dtype=np.float64)
    if center.ndim != 1 or spread.shape != (len(center), len(center)):
        raise ValueError(
            f"mean {center.shape} and covariance {spread.shape}: must be [R] and [R, R]."
        )
    if not np.isfinite(center).all() or not np.isfinite(spread).all():
        raise ValueError("mean and covariance: must be finite numbers.")
    if not len(center):
        return center, spread
    largest = float(np.abs(spread).max())
    if np.abs(spread - spread.T).max() > ROUNDING * largest:
        raise ValueError("covariance: must be symmetric.")
    values, vectors = np.linalg.eigh((spread + spread.T) / 2)
    if values.min() < -ROUNDING * max(largest, float(values.max())):
        raise ValueError(
            f"covariance: has the negative eigenvalue {values.min():.3g}; it must have none."
        )
    return center, np.asarray(vectors * np.sqrt(np.clip(values, 0.0, None)))


def _matrix(rows: ArrayLike, columns: int, name: str, first: str) -> Array:
    """Return the argument `name` as a matrix: [first, columns]. An empty list has no rows.

    Raises:
        ValueError: it has another shape.
    """
    matrix = np.asarray(rows, dtype=np.float64)
    if matrix.size == 0 and matrix.ndim == 1:
        return np.zeros((0, columns))
    if matrix.ndim != 2 or matrix.shape[1] != columns:
        raise ValueError(f"{name} {matrix.shape}: must be [{first}, {columns}].")
    return matrix


def _rows(differences: ArrayLike, columns: int) -> Array:
    """Return the rows that compare something: those without a NaN or infinity."""
    rows = _matrix(differences, columns, "differences", "C")
    return rows[np.isfinite(rows).all(axis=1)]


def _norms(rows: Array) -> Array:
    """Return the length of each row, without overflow in its square."""
    largest = np.abs(rows).max(axis=1, initial=0.0)
    is_usable = (largest > 0) & np.isfinite(largest)
    scale = np.where(is_usable, largest, 1.0)
    scaled = rows / scale[:, None]
    squares = (scaled**2).sum(axis=1)
    return np.asarray(scale * np.sqrt(squares))


def _shrinkage(rows: Array, length: Array) -> Array:
    """Return the factor that brings each row to at most MAX_LENGTH."""
    factor = np.ones(len(rows))
    # A length that overflows is estimated by the largest entry, far beyond the limit anyway.
    largest = np.abs(rows).max(axis=1, initial=0.0)
    length = np.where(np.isfinite(length), length, largest)
    is_long = length > MAX_LENGTH
    factor[is_long] = MAX_LENGTH / length[is_long]
    return factor


def _minimise_loss(offset: Array, design: Array) -> Array:
    """Return the z that minimises `_loss`, by Newton's method with step halving.

    Args:
        offset: [C] margins at z = 0.
        design: [C, R] change of the margins per unit of z.

    Returns:
        [R].
    """
    z = np.zeros(design.shape[1])
    loss = _loss(z, offset, design)
    for _ in range(MAX_STEPS):
        margin = offset + design @ z
        gradient = z - design.T @ expit(-margin)
        step = -np.linalg.solve(_curvature(z, offset, design), gradient)
        slope = float(gradient @ step)
        if -slope <= TOLERANCE:
            break
        size = 1.0
        for _ in range(MAX_HALVINGS):
            new_loss = _loss(z + size * step, offset, design)
            promised = size * slope
            if new_loss <= loss + SUFFICIENT_GAIN * promised:
                break
            size /= 2
        else:
            # Rounding hides what is left to gain.
            break
        z = z + size * step
        loss = new_loss
    return z


def _loss(z: Array, offset: Array, design: Array) -> float:
    """Return minus the logarithm of the posterior, up to a constant."""
    margin = offset + design @ z
    minus_log_prior = z @ z / 2
    minus_log_likelihoods = np.logaddexp(0.0, -margin)
    return float(minus_log_prior + minus_log_likelihoods.sum())


def _curvature(z: Array, offset: Array, design: Array) -> Array:
    """Return the second derivative of `_loss`: [R, R], with eigenvalues of at least 1."""
    margin = offset + design @ z
    weights = expit(margin) * expit(-margin)
    weighted = design * weights[:, None]
    return np.asarray(np.eye(len(z)) + weighted.T @ design)
