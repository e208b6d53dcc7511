"""What to use for a budget, how sure that is, and what it comes to on prompts that did not choose it.

The best of many settings looks better than it is. Two figures say by how much to doubt it: the share of bootstrap resamples of the
prompts in which a setting is the best within the budget, and what choosing by one half of the prompts reaches on the other half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infer_align_bench.quality.curve import Array, Cost, Mean, Point, Table

REPLICATES = 2000
HALVES = 200
ENOUGH = 2.0  # standard errors that a step up must be worth
NEARLY = 0.9  # of the best gain that is on offer


@dataclass(frozen=True, slots=True)
class Cheaper:
    """A cheaper setting which these prompts cannot tell from the choice; `loss` is what it may cost, not that it costs nothing."""

    name: str
    loss: Mean

    @property
    def most(self) -> float:
        """The loss is at most this, with 97.5%."""
        return self.loss.value + ENOUGH * self.loss.error


@dataclass(frozen=True, slots=True)
class Advice:
    """What to use for so many tokens, or seconds, per answer and more."""

    cost: float
    name: str
    gold: Mean
    chance: float  # that it is the best within the budget
    held_out: float  # gold of what one half of the prompts chooses, on the other half
    cheaper: Cheaper | None


def advice(
    table: Table, found: Sequence[Point], seed: int = 0, cost: Cost = "tokens"
) -> list[Advice]:
    """For each budget at which the choice changes: what to use, how sure that is, and what is cheaper and not told apart."""
    names = [cell.name for cell in table.cells]
    ordered = sorted(
        (point for point in found if point.comparable(cost)), key=lambda point: point.cost(cost)
    )
    if not ordered or not table.required.any():
        return []
    rows = np.array(
        [table.gold[names.index(point.cell.name)][table.required] for point in ordered]
    )  # [points, prompts]
    chance = np.random.default_rng(seed)
    prompts = rows.shape[1]
    drawn = chance.multinomial(prompts, np.full(prompts, 1 / prompts), size=REPLICATES) @ rows.T
    halves = chance.permuted(np.tile(np.arange(prompts) < prompts // 2, (HALVES, 1)), axis=1)
    given = []
    for i, point in enumerate(ordered):
        if cost not in point.fronts:
            continue
        limit = point.cost(cost)
        within = sum(other.cost(cost) <= limit for other in ordered)
        best = float((drawn[:, :within].argmax(axis=1) == i).mean())
        cheap = (
            _cheaper(table, ordered[j], rows[i] - rows[j])
            for j in range(within)
            if ordered[j].cost(cost) < 0.9 * limit
        )
        given.append(
            Advice(
                limit,
                point.cell.name,
                point.gold,
                best,
                _held_out(rows[:within], halves),
                next(filter(None, cheap), None),
            )
        )
    return given


def _held_out(rows: Array, halves: NDArray[np.bool_]) -> float:
    """[points, prompts], [splits, prompts] -> mean gold, on the half that did not choose, of the setting that the other chose."""
    if rows.shape[1] < 2:
        return math.nan
    found = []
    for chosen in (halves, ~halves):
        best = ((chosen @ rows.T) / chosen.sum(axis=1, keepdims=True)).argmax(axis=1)
        others = (~chosen @ rows.T) / (~chosen).sum(axis=1, keepdims=True)
        found.append(others[np.arange(len(best)), best].mean())
    return float(np.mean(found))


def _cheaper(table: Table, other: Point, lost: Array) -> Cheaper | None:
    loss = table.mean(lost)
    return (
        None if loss is None or loss.value > ENOUGH * loss.error else Cheaper(other.cell.name, loss)
    )


@dataclass(frozen=True, slots=True)
class Headline:
    """Three settings for a reader with a minute."""

    cheap: Point | None  # the cheapest that is measurably better than the baseline
    default: Point  # the cheapest that reaches nine tenths of the best one's gain over the baseline
    best: Point


def headline(found: Sequence[Point], baseline: str, cost: Cost = "tokens") -> Headline | None:
    """What to say first; None where nothing can be compared."""
    ordered = sorted(
        (point for point in found if point.comparable(cost)), key=lambda point: point.cost(cost)
    )
    base = next((point for point in found if point.cell.name == baseline), None)
    if not ordered or base is None:
        return None
    best = max(ordered, key=lambda point: point.gold.value)
    gains = [(point, point.gold.value - base.gold.value) for point in ordered]
    most = best.gold.value - base.gold.value
    default = next((point for point, gain in gains if most > 0 and gain >= NEARLY * most), best)
    better = [
        p
        for p in ordered
        if (m := p.minus_baseline) and m.value > ENOUGH * np.nan_to_num(m.error, nan=math.inf)
    ]
    return Headline(better[0] if better else None, default, best)
