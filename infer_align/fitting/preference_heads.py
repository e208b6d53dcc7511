"""Fit an ensemble of linear heads to preference pairs: logistic Bradley-Terry regression.

With d the features of the chosen answer minus those of the rejected one, a head w says

    P(chosen is better) = sigmoid(w . d)

Members differ by their seed, by the prompts that they see (a bootstrap over prompts) and by the
features that they see. Two ways find wrong labels:

    vote      members that did not see a pair vote on it; the pairs with the lowest mean margin are
              flipped where all members agree, and pairs on which the members disagree count half
    exchange  each member fits the pairs on which the loss of the other members is small, few first

Shapes: C pairs, F features, K members.

Sources: Wang et al., "Secrets of RLHF in Large Language Models Part II: Reward Modeling"
(2401.06080) for the vote; "Two Minds Better Than One: Collaborative Reward Modeling for LLM
Alignment" (2505.10597) for the exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_expit
from torch.nn.functional import logsigmoid

from infer_align.diagnostics.calibration import fit_scale
from infer_align.fitting.regression import split_by_prompt
from infer_align.types import Array

Noise: TypeAlias = Literal["none", "vote", "exchange"]
Index: TypeAlias = NDArray[np.int64]
Rows: TypeAlias = NDArray[np.bool_]
# Weights of the penalty that cross-validation tries, per pair.
PENALTIES: tuple[float, ...] = tuple(10.0 ** (step / 2) for step in range(3, -8, -1))
# The search ends when this many smaller penalties in a row were worse.
PATIENCE = 2
FOLDS = 5
# Share of the features that a member sees.
FEATURE_SHARE = 0.75
# Rounds of the exchange, and the share of the clean pairs that the first of them fits.
ROUNDS = 5
EASY_SHARE = 0.5
# The iteration of a fit ends at this size of the gradient.
TOLERANCE = 1e-5
MAX_STEPS = 500


@dataclass(frozen=True, slots=True)
class PairFeatures:
    """The differences of the two answers of C pairs.

    Attributes:
        features: [C, F], chosen minus rejected.
        lengths: [C, 2], the same of the length features.
        prompts: [C], equal numbers for pairs of one prompt.
    """

    features: Array
    lengths: Array
    prompts: Index

    def select(self, rows: Rows) -> PairFeatures:
        """Return some of the pairs."""
        return PairFeatures(self.features[rows], self.lengths[rows], self.prompts[rows])


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """The settings of an ensemble of heads.

    Attributes:
        members: number of heads.
        seed: of the bootstraps and of the feature subsets.
        length_free: True to regress the length of the answers out of the features.
        noise: how wrong labels are found.
        noise_rate: the largest share of labels that count as wrong.
    """

    members: int = 5
    seed: int = 0
    length_free: bool = False
    noise: Noise = "none"
    noise_rate: float = 0.1


class Cleaning(NamedTuple):
    """The labels as they are used: [C] targets, 1 or 0 if flipped, and [C] weights."""

    targets: Array
    weights: Array

    @property
    def flipped(self) -> int:
        """Return the number of flipped labels."""
        return int((self.targets == 0).sum())

    @property
    def halved(self) -> int:
        """Return the number of pairs that count half, or not at all."""
        return int((self.weights < 1).sum())


class FittedHeads(NamedTuple):
    """The result of a fit.

    Attributes:
        weights: [K, F].
        length: [K, 2].
        penalty: the penalty that cross-validation chose.
        cleaning: the labels as they were used; with "exchange", the pairs that no member used
            count 0.
    """

    weights: Array
    length: Array
    penalty: float
    cleaning: Cleaning

    def margins(self, pairs: PairFeatures) -> Array:
        """Return the score of the chosen minus that of the rejected answers: [K, C]."""
        margins: Array = self.weights @ pairs.features.T + self.length @ pairs.lengths.T
        return margins


def fit_heads(pairs: PairFeatures, settings: HeadSettings) -> FittedHeads:
    """Fit an ensemble.

    The result depends on the arguments alone. Scores are in log-odds: their scale is the one that
    explains pairs best which the members did not see.
    """
    threads = torch.get_num_threads()
    # The products are small: on a busy machine, threads that wait for each other take 100 times
    # as long.
    torch.set_num_threads(1)
    try:
        return _fit_heads(pairs, settings)
    finally:
        torch.set_num_threads(threads)


def _fit_heads(pairs: PairFeatures, settings: HeadSettings) -> FittedHeads:
    design = _Design.of(pairs, length_free=settings.length_free)
    penalty = _choose_penalty(design.rows, pairs.prompts, settings.seed)
    unseen = _unseen_margins(design, pairs.prompts, penalty, settings)
    cleaning = _no_cleaning(len(pairs.prompts))
    if settings.noise == "vote":
        cleaning = vote(unseen, settings.noise_rate)
    weights = np.stack(_fit_members(design, pairs.prompts, penalty, settings, cleaning))
    if settings.noise == "exchange":
        weights, cleaning = _exchange(design, pairs.prompts, weights, penalty, settings)
    scale = _scale(unseen.mean(axis=0))
    features, length = design.unstandardised(weights * scale)
    return FittedHeads(features, length, penalty, cleaning)


def vote(margins: Array, rate: float) -> Cleaning:
    """Return the labels after a vote of members that did not see the pairs.

    A label is flipped if all members vote against it, and it is among those with the lowest mean
    margin. A pair on which the members disagree counts half.

    Args:
        margins: [K, C] of K members for C pairs, chosen minus rejected.
        rate: the largest share of labels that are flipped.
    """
    mean = margins.mean(axis=0)
    spread = margins.std(axis=0)
    targets = np.ones(len(mean))
    weights = np.where(spread > np.abs(mean), 0.5, 1.0)
    suspects = np.argsort(mean, kind="stable")[: int(rate * len(mean))]
    is_unanimous = (margins[:, suspects] < 0).all(axis=0)
    flipped = suspects[is_unanimous]
    targets[flipped] = 0.0
    weights[flipped] = 1.0
    return Cleaning(targets, weights)


def fit_head(
    rows: Array, targets: Array, weights: Array, penalty: float, start: Array | None = None
) -> Array:
    """Return the head w that explains the pairs best: [F].

    It minimises the weighted mean of the logistic loss plus penalty / 2 |w|².

    Args:
        rows: [C, F] differences.
        targets: [C], 1 where the first answer is better, 0 where the second one is.
        weights: [C], not negative, at least one of them positive.
        penalty: positive.
        start: [F], where the iteration starts; the result does not depend on it, up to rounding.
    """
    design = torch.from_numpy(np.ascontiguousarray(rows))
    labels = torch.from_numpy(targets)
    shares = torch.from_numpy(weights / weights.sum())
    first = np.zeros(rows.shape[1]) if start is None else start
    head = torch.tensor(first, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [head], max_iter=MAX_STEPS, tolerance_grad=TOLERANCE, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        margins = torch.mv(design, head.detach())
        likelihood = labels * logsigmoid(margins) + (1 - labels) * logsigmoid(-margins)
        residuals = shares * (torch.sigmoid(margins) - labels)
        head.grad = torch.mv(design.T, residuals) + penalty * head.detach()
        squares: torch.Tensor = head.detach().square().sum()
        return -(shares * likelihood).sum() + penalty / 2 * squares

    step: Callable[[Callable[[], torch.Tensor]], object] = optimizer.step
    step(loss)
    fitted: Array = head.detach().numpy()
    return fitted


@dataclass(frozen=True, slots=True)
class _Design:
    """The standardised features of pairs, and the way back.

    The rows are (features - lengths @ slopes) / spread, with the lengths themselves as two more
    features unless they are regressed out.
    """

    rows: Array  # [C, F] or [C, F + 2]
    spread: Array  # of each column
    slopes: Array  # [2, F]
    size: int  # F

    @classmethod
    def of(cls, pairs: PairFeatures, *, length_free: bool) -> _Design:
        size = pairs.features.shape[1]
        slopes: Array = np.zeros((pairs.lengths.shape[1], size))
        rows: Array = np.concatenate([pairs.features, pairs.lengths], axis=1)
        if length_free:
            solution = np.linalg.lstsq(pairs.lengths, pairs.features, rcond=None)[0]
            slopes = np.asarray(solution, dtype=np.float64)
            rows = pairs.features - pairs.lengths @ slopes
        spread = np.sqrt((rows**2).mean(axis=0))
        spread[spread <= 1e-12] = 1.0
        return cls(rows / spread, spread, slopes, size)

    def unstandardised(self, weights: Array) -> tuple[Array, Array]:
        """Return the weights of the features [K, F] and of the lengths [K, 2]."""
        plain = weights / self.spread
        features = plain[:, : self.size]
        length = -features @ self.slopes.T
        if plain.shape[1] > self.size:
            length = length + plain[:, self.size :]
        return features, length


def _choose_penalty(rows: Array, prompts: Index, seed: int) -> float:
    """Return the penalty whose heads explain unseen pairs best."""
    folds = _folds(prompts, seed)
    heads = [np.zeros(rows.shape[1]) for _ in folds]
    best, best_likelihood, worse = PENALTIES[0], -np.inf, 0
    for penalty in PENALTIES:
        likelihood = 0.0
        for index, fold in enumerate(folds):
            ones = np.ones(int((~fold).sum()))
            heads[index] = fit_head(rows[~fold], ones, ones, penalty, heads[index])
            likelihood += float(log_expit(rows[fold] @ heads[index]).sum())
        if likelihood > best_likelihood:
            best, best_likelihood, worse = penalty, likelihood, 0
        else:
            worse += 1
        if worse == PATIENCE:
            break
    return best


def _folds(prompts: Index, seed: int) -> list[Rows]:
    """Return the pairs of each fold; pairs of one prompt are in one fold."""
    unique, positions = np.unique(prompts, return_inverse=True)
    count = min(FOLDS, len(unique))
    fold_of_prompt = np.random.default_rng([seed, 1]).permutation(len(unique)) % count
    folds = fold_of_prompt[positions]
    return [folds == fold for fold in range(count)]


def _unseen_margins(
    design: _Design, prompts: Index, penalty: float, settings: HeadSettings
) -> Array:
    """Return the margins by members that were fitted without the pair: [K, C]."""
    margins = np.zeros((settings.members, len(prompts)))
    for fold in _folds(prompts, settings.seed):
        rest = _Design(design.rows[~fold], design.spread, design.slopes, design.size)
        plain = _no_cleaning(len(rest.rows))
        heads = _fit_members(rest, prompts[~fold], penalty, settings, plain)
        margins[:, fold] = np.stack(heads) @ design.rows[fold].T
    return margins


def _fit_members(
    design: _Design, prompts: Index, penalty: float, settings: HeadSettings, cleaning: Cleaning
) -> list[Array]:
    """Return one head per member: [F] with zeros for the features that it does not see."""
    heads: list[Array] = []
    for member in range(settings.members):
        counts, columns = _member_view(design, prompts, settings, member)
        head = np.zeros(design.rows.shape[1])
        head[columns] = fit_head(
            design.rows[:, columns], cleaning.targets, cleaning.weights * counts, penalty
        )
        heads.append(head)
    return heads


def _member_view(
    design: _Design, prompts: Index, settings: HeadSettings, member: int
) -> tuple[Array, Index]:
    """Return how often a member sees each pair [C], and the features that it sees.

    A single member sees everything.
    """
    columns = np.arange(design.rows.shape[1])
    if settings.members == 1:
        return np.ones(len(prompts)), columns
    random = np.random.default_rng([settings.seed, 2, member])
    # A bootstrap of the prompts: each pair counts as often as its prompt was drawn.
    unique, prompt_of_pair = np.unique(prompts, return_inverse=True)
    drawn = random.integers(0, len(unique), len(unique))
    draws_of_prompt = np.bincount(drawn, minlength=len(unique))
    counts = draws_of_prompt[prompt_of_pair].astype(np.float64)
    size = max(1, round(FEATURE_SHARE * design.size))
    subset = random.choice(design.size, size, replace=False)
    # Every member sees the lengths, so that no member explains them by other features.
    lengths = columns[design.size :]
    return counts, np.sort(np.concatenate([subset, lengths]))


def _exchange(
    design: _Design, prompts: Index, heads: Array, penalty: float, settings: HeadSettings
) -> tuple[Array, Cleaning]:
    """Refit each member on the pairs on which the mean loss of the other members is small.

    The first rounds take the easiest pairs, the last one all but the noisy share.
    """
    count = len(design.rows)
    used = np.zeros(count)
    for step in range(1, ROUNDS + 1):
        share = (1 - settings.noise_rate) * (EASY_SHARE + (1 - EASY_SHARE) * step / ROUNDS)
        easy_count = max(1, int(share * count))
        losses = -log_expit(heads @ design.rows.T)
        used = np.zeros(count)
        for member in range(len(heads)):
            peer_loss = np.delete(losses, member, axis=0).mean(axis=0)
            easiest = np.argsort(peer_loss, kind="stable")[:easy_count]
            easy = np.zeros(count)
            easy[easiest] = 1.0
            used = np.maximum(used, easy)
            counts, columns = _member_view(design, prompts, settings, member)
            rows = design.rows[:, columns]
            heads[member, columns] = fit_head(rows, np.ones(count), easy * counts, penalty)
    return heads, Cleaning(np.ones(count), used)


def _no_cleaning(count: int) -> Cleaning:
    return Cleaning(np.ones(count), np.ones(count))


def _scale(margins: Array) -> float:
    """Return the factor that turns margins into log-odds; 1 if they explain nothing."""
    scale = fit_scale(margins)
    return scale if np.isfinite(scale) and scale > 0 else 1.0


def hold_out(prompts: Sequence[int], share: float, seed: int) -> Rows:
    """Return True for the pairs of the prompts that are held out."""
    return np.asarray(split_by_prompt(list(prompts), share, seed).numpy(), dtype=np.bool_)
