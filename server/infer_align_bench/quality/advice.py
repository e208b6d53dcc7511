"""Recommend a setting for each budget, with the uncertainty of the choice.

The best of many settings looks better than it is. Two figures show by how much: the share of
bootstrap resamples of the prompts in which the setting is the best within the budget, and the gold
on one half of the prompts of the setting that the other half chooses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infer_align_bench.quality.curve import Array, Cost, Mean, Point, Table

REPLICATES = 2000
SPLITS = 200
# A difference is measurable if it exceeds this number of standard errors.
SIGNIFICANT_ERRORS = 2.0
# The default setting reaches this share of the best gain over the baseline.
DEFAULT_SHARE = 0.9
# A cheaper alternative costs at most this share of the recommended setting.
CHEAPER_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Cheaper:
    """A cheaper setting whose gold these prompts cannot distinguish from the recommendation."""

    name: str
    # Loss of gold. It may be positive although it is not measurable.
    loss: Mean

    @property
    def max_loss(self) -> float:
        """Return the upper bound of the loss (97.5%)."""
        return self.loss.value + SIGNIFICANT_ERRORS * self.loss.error


@dataclass(frozen=True, slots=True)
class Advice:
    """The setting to use for a budget of at least `cost` per answer."""

    # Tokens or seconds.
    cost: float
    name: str
    gold: Mean
    # Probability that it is the best setting within the budget.
    chance: float
    # Gold on one half of the prompts of the setting that the other half chooses.
    held_out: float
    cheaper: Cheaper | None


def make_advice(
    table: Table, points: Sequence[Point], seed: int = 0, cost: Cost = "tokens"
) -> list[Advice]:
    """Return one recommendation for each budget at which the choice changes.

    Args:
        table: the scores.
        points: the settings.
        seed: of the resamples.
        cost: the kind of budget.
    """
    ordered = _by_cost(points, cost)
    if not ordered or not table.required.any():
        return []
    rows = [table.gold[table.index(point.cell.name)] for point in ordered]
    # [points, prompts]
    gold = np.array([row[table.required] for row in rows])
    prompts = gold.shape[1]
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=REPLICATES)
    resampled = weights @ gold.T
    first_half = np.tile(np.arange(prompts) < prompts // 2, (SPLITS, 1))
    splits = generator.permuted(first_half, axis=1)
    result = []
    for i, point in enumerate(ordered):
        if cost not in point.fronts:
            continue
        affordable = sum(other.cost(cost) <= point.cost(cost) for other in ordered)
        wins = resampled[:, :affordable].argmax(axis=1) == i
        advice = Advice(
            cost=point.cost(cost),
            name=point.cell.name,
            gold=point.gold,
            chance=float(wins.mean()),
            held_out=_held_out_gold(gold[:affordable], splits),
            cheaper=_cheaper(table, ordered, gold, i, cost),
        )
        result.append(advice)
    return result


def _by_cost(points: Sequence[Point], cost: Cost) -> list[Point]:
    comparable = [point for point in points if point.comparable(cost)]
    return sorted(comparable, key=lambda point: point.cost(cost))


def _held_out_gold(gold: Array, splits: NDArray[np.bool_]) -> float:
    """Return the mean gold, on one half of the prompts, of the setting best on the other half.

    Args:
        gold: [points, prompts].
        splits: [splits, prompts], True for the prompts of the first half.
    """
    if gold.shape[1] < 2:
        return math.nan
    means = []
    for choosing in (splits, ~splits):
        best = _half_means(gold, choosing).argmax(axis=1)
        other_half = _half_means(gold, ~choosing)
        means.append(other_half[np.arange(len(best)), best].mean())
    return float(np.mean(means))


def _half_means(gold: Array, half: NDArray[np.bool_]) -> Array:
    """Return the mean gold over a half of the prompts, [splits, points]."""
    means: Array = (half @ gold.T) / half.sum(axis=1, keepdims=True)
    return means


def _cheaper(
    table: Table, ordered: Sequence[Point], gold: Array, i: int, cost: Cost
) -> Cheaper | None:
    """Return the cheapest setting that is not measurably worse than the one with index `i`."""
    for j, other in enumerate(ordered):
        if other.cost(cost) >= CHEAPER_SHARE * ordered[i].cost(cost):
            return None
        loss = table.mean(gold[i] - gold[j])
        if loss is not None and not loss.value > SIGNIFICANT_ERRORS * loss.error:
            return Cheaper(other.cell.name, loss)
    return None


@dataclass(frozen=True, slots=True)
class Headline:
    """The three settings that the report names first."""

    # The cheapest that is measurably better than the baseline.
    cheap: Point | None
    # The cheapest that reaches nine tenths of the best gain over the baseline.
    default: Point
    # The setting with the highest gold.
    best: Point


def make_headline(points: Sequence[Point], baseline: str, cost: Cost = "tokens") -> Headline | None:
    """Return the settings to name first; None if no settings can be compared."""
    ordered = _by_cost(points, cost)
    baseline_gold = None
    for point in points:
        if point.cell.name == baseline:
            baseline_gold = point.gold.value
    if not ordered or baseline_gold is None:
        return None
    best = max(ordered, key=lambda point: point.gold.value)
    best_gain = best.gold.value - baseline_gold
    default = best
    if best_gain > 0:
        threshold = DEFAULT_SHARE * best_gain
        default = next(p for p in ordered if p.gold.value - baseline_gold >= threshold)
    cheap = next((point for point in ordered if _measurably_better(point)), None)
    return Headline(cheap, default, best)


def _measurably_better(point: Point) -> bool:
    difference = point.minus_baseline
    if difference is None or math.isnan(difference.error):
        return False
    return difference.value > SIGNIFICANT_ERRORS * difference.error


def kl_warnings(
    points: Sequence[Point],
    headline: Headline | None,
    advice: Mapping[Cost, Sequence[Advice]],
    kl_limit: float,
) -> list[str]:
    """Return a warning for each recommended setting whose KL is above a limit.

    Args:
        points: the settings.
        headline: the settings that are named first.
        advice: the settings for each budget.
        kl_limit: in nats per answer.
    """
    recommended: set[str] = set()
    if headline is not None:
        recommended |= {headline.default.cell.name, headline.best.cell.name}
        if headline.cheap is not None:
            recommended.add(headline.cheap.cell.name)
    for choices in advice.values():
        recommended |= {choice.name for choice in choices}
    warnings = []
    for point in points:
        if point.cell.name in recommended and point.kl is not None and point.kl.value > kl_limit:
            warnings.append(
                f"{point.cell.name} is recommended at {point.kl.value:.3g} nats of KL, above "
                f"--kl-limit {kl_limit:g}. So far from the frozen model, text often breaks: read "
                "its answers before you use it."
            )
    return warnings
