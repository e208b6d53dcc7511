"""Adaptive number of draws: draw in batches until one more batch is not worth its cost.

Best-of-n spends the same number of draws on every prompt. Here each batch is a box that may be
opened for a price, as in Pandora's problem (Weitzman, "Optimal Search for the Best Alternative",
1979): drawing ends when the expected gain over the best candidate so far is below the price. The
distribution of the objective is not known, it is learned from the candidates themselves, as in
"BEACON: Bayesian Optimal Stopping for Efficient LLM Sampling" (2510.15945). BEACON looks ahead over
all draws that remain; this rule looks ahead by one batch.

The model of the objective is a normal of unknown mean and variance with Jeffreys' prior, 1 over the
variance. After N scores of mean m and sum of squares S, S / variance is chi-square with N degrees
of freedom, and the mean is normal around m with the variance / N. So a new score follows a Student
t: after few scores, large values are likelier than under a normal that is fitted to them. Without
this correction the rule would trust the spread of a few scores and stop too early.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.polynomial.hermite_e import hermegauss
from numpy.polynomial.legendre import leggauss
from numpy.typing import ArrayLike
from scipy.special import ndtr

from infer_align.methods import PlanDraft, Stage, StopRule
from infer_align.types import Array, Capability

# Nodes of the quadratures over the mean, the best of a batch, and the variance. With these the gain
# is exact to 1e-4, and mostly to 1e-6.
_MEANS = hermegauss(8)
_BESTS = leggauss(32)
_VARIANCES = 128
# The best of a batch is below this many standard deviations, but for a probability of 1e-12 or so.
_HIGHEST = 10.0
# Scores this close, in standard deviations, are one score that was computed in two batches.
_SAME_SCORE = 1e-5


@dataclass(frozen=True, slots=True)
class Adaptive:
    """Draw candidates in batches until the expected gain of one more batch is below its cost."""

    max_n: int = field(
        default=64,
        metadata={
            "ge": 1,
            "description": "Maximum number of candidates per prompt, over all directions. "
            "Limits and budgets count all of them; what was not drawn is given back.",
        },
    )
    batch: int = field(
        default=4,
        metadata={
            "ge": 1,
            "description": "Candidates that are drawn at once, spread over the directions of rps. "
            "The first batch is larger if best_of_n or n ask for more.",
        },
    )
    cost: float = field(
        default=0.05,
        metadata={
            "ge": 0,
            "description": "Smallest expected gain that is worth another batch, in standard "
            "deviations of the objective over the candidates of the prompt.",
        },
    )

    stage: ClassVar[Stage] = Stage.PROPOSE
    needs: ClassVar[frozenset[Capability]] = frozenset()
    relies_on: ClassVar[str] = "rewards"
    fan_out: ClassVar[str] = "max_n"

    def apply(self, draft: PlanDraft) -> PlanDraft:
        """Let the draws be continued in batches, and select among all candidates."""
        rule = ExpectedGain(self.max_n, self.batch, self.cost)
        note = draft.note
        if not note and self.max_n > 1 and draft.draws[0].body.get("temperature") == 0:
            note = "temperature 0 draws equal candidates; set a temperature over 0"
        return replace(draft, stop_rule=rule, selects=True, note=note)


plugin = Adaptive


@dataclass(frozen=True, slots=True)
class ExpectedGain(StopRule):
    """Ends the drawing when the expected gain of one more batch is below its cost."""

    max_candidates: int
    batch: int
    cost: float  # in standard deviations of the objective

    def gain(self, objective: Array) -> float:
        """Return the expected gain of one more batch, in standard deviations of the objective.

        Not every draw of a batch can gain. As large a share of it is expected to be compared as of
        those before. And if k candidates share the best score, draws that reach it are expected to
        repeat it, all but one in k: where answers reach a ceiling, there is little to gain.

        Args:
            objective: [N] of the candidates so far; NaN marks one that was not compared.
        """
        compared = objective[~np.isnan(objective)]
        if len(compared) < 2:
            return math.inf
        tolerance = _SAME_SCORE * float(np.std(compared))
        best = int(np.count_nonzero(compared >= compared.max() - tolerance))
        return expected_gain(compared, self.batch * len(compared) / len(objective) / best)

    def reason_to_stop(self, objective: Array) -> str | None:
        """Return the gain that is too small, or None if another batch is worth its cost."""
        gain = self.gain(objective)
        if gain >= self.cost:
            return None
        return (
            f"the expected gain of {self.batch} more is {gain:.3g} standard deviations, under the "
            f"cost of {self.cost:g}"
        )


def expected_gain(scores: ArrayLike, batch: float) -> float:
    """Return the expected gain of the best of `batch` more draws over the best score so far.

    The gain is in sample standard deviations of the scores, so it does not change if all scores are
    shifted or scaled by a positive factor. It falls with the distance of the best score from the
    mean. If all scores are equal it is 0: there is no spread to gain from.

    Args:
        scores: [N] scores so far; those that are not finite are left out.
        batch: number of further draws, over 0; an expected number need not be whole.

    Returns:
        The gain, at least 0; infinity with fewer than 2 scores, which say nothing about the spread.

    Raises:
        ValueError: the scores are not [N], or batch is not over 0.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"scores: shape {values.shape} is not allowed; must be [N].")
    if not batch > 0:
        raise ValueError(f"batch: {batch} is not allowed; must be over 0.")
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return math.inf
    largest = float(np.abs(values).max())
    if values.min() == values.max():
        return 0.0
    # Scaled first, so that squares of large scores do not overflow.
    values = values / largest
    margin = float((values.max() - values.mean()) / values.std(ddof=1))
    return _gain(margin, len(values), batch)


def _gain(margin: float, n: int, batch: float) -> float:
    """Return E[(best of batch - best so far)+], in sample standard deviations.

    With r the posterior ratio of the standard deviation to that of the sample, e ~ N(0, 1 / n) the
    error of the mean and b the best of `batch` standard normals, it is E[(r (e + b) - margin)+], or
    E[r G(margin / r)] with G(k) the integral from k to infinity of P(e + b > x) dx.
    """
    ratios, weights = _spread_ratios(n)
    lowest = np.minimum(margin / ratios, _HIGHEST)
    nodes, node_weights = _BESTS
    half = (_HIGHEST - lowest)[:, None] / 2.0
    x = lowest[:, None] + half * (nodes + 1.0)
    errors, error_weights = _MEANS
    below = ndtr(x[:, :, None] - errors / math.sqrt(n)) ** batch
    exceeds = 1.0 - below @ (error_weights / error_weights.sum())
    gains = (exceeds * half) @ node_weights
    return float(weights @ (ratios * gains))


def _spread_ratios(n: int) -> tuple[Array, Array]:
    """Return nodes and weights of the posterior of standard deviation / sample deviation.

    Its square is (n - 1) / c, with c chi-square of n degrees of freedom. The nodes are even in
    log c, where the density falls off fast on both sides.
    """
    center = math.log(n)
    width = 10.0 / math.sqrt(n)
    logs = np.linspace(center - width - 60.0 / (n - 1), center + width, _VARIANCES)
    exponents = 0.5 * (n * logs - np.exp(logs))
    weights = np.exp(exponents - exponents.max())
    return np.sqrt((n - 1) / np.exp(logs)), np.asarray(weights / weights.sum())
