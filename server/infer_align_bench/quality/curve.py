"""What the scored answers say: means with standard errors, differences by prompt, the Pareto front, and what to use for a budget.

Prompts are what is drawn from a population, so errors are over prompts: the draws of one prompt are averaged first. Differences are
taken prompt by prompt. The chance to be best is the share of bootstrap resamples of the prompts in which a setting is the best of
those within the budget: the best of many settings looks better than it is, and this says by how much to doubt it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from infer_align_bench.quality.cells import Row
from infer_align_bench.quality.grid import Cell, Grid

Array = NDArray[np.float64]
Cost = Literal["tokens", "seconds"]
COSTS: tuple[Cost, ...] = ("tokens", "seconds")
REPLICATES = 2000
ENOUGH = 2.0  # standard errors that a step up must be worth


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean and its standard error over prompts."""

    value: float
    error: float

    @property
    def decimals(self) -> int:
        """Digits after the point that its error leaves a meaning: two of the error's own."""
        return max(0, 1 - math.floor(math.log10(self.error))) if 0 < self.error < math.inf else 2


@dataclass(frozen=True, slots=True)
class Point:
    """One setting's place."""

    cell: Cell
    prompts: int
    gold: Mean
    tokens: float  # spent per answer
    seconds: float
    minus_baseline: Mean | None
    minus_greedy: Mean | None
    minus_equal: Mean | None  # against the equal-budget family at the same tokens
    fronts: frozenset[Cost] = frozenset()  # the costs of which nothing cheaper is better

    @property
    def front(self) -> bool:
        """Whether nothing is better for fewer tokens."""
        return "tokens" in self.fronts


@dataclass(frozen=True, slots=True)
class Advice:
    """What to use for so many tokens, or seconds, per answer and more."""

    cost: float
    name: str
    gold: Mean
    chance: float  # that it is the best within the budget
    cheaper: str | None  # a cheaper setting that is not worse by more than ENOUGH standard errors


class Table:
    """Gold, tokens and seconds by setting and prompt; NaN where there is nothing. [cells, prompts]."""

    def __init__(self, grid: Grid, rows: Iterable[Row], keys: Mapping[tuple[str, int], str]) -> None:
        self.cells = list(grid.cells)
        at = {cell.name: i for i, cell in enumerate(self.cells)}
        prompts = 1 + max((prompt for _, prompt in keys), default=-1)
        places: dict[str, list[tuple[int, int]]] = {}  # one answer serves all that asked the same
        for (name, prompt), key in keys.items():
            places.setdefault(key, []).append((at[name], prompt))
        sums = np.zeros((4, len(self.cells), prompts))
        for row in rows:
            if row.gold is None:
                continue
            for place in places.get(row.key, ()):
                sums[(slice(None), *place)] += (row.gold, row.spent, row.seconds, 1.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            self.gold, self.tokens, self.seconds = (part / sums[3] for part in sums[:3])

    def mean(self, values: Array) -> Mean | None:
        """Over the prompts that have a value."""
        present = values[np.isfinite(values)]
        if not present.size:
            return None
        error = float(present.std(ddof=1) / math.sqrt(present.size)) if present.size > 1 else math.nan
        return Mean(float(present.mean()), error)


def points(table: Table, grid: Grid) -> list[Point]:
    """Every setting that has been measured, cheapest first."""
    names = [cell.name for cell in table.cells]
    base = table.gold[names.index(grid.baseline)]
    greedy = table.gold[names.index(grid.greedy)] if grid.greedy else None
    spent = {i: float(np.nanmean(table.tokens[i])) for i in range(len(names)) if np.isfinite(table.gold[i]).any()}
    family = sorted((i for i in spent if table.cells[i].equal_budget or names[i] == grid.baseline), key=lambda i: spent[i])
    found = []
    for i, tokens in spent.items():
        gold = table.mean(table.gold[i])
        assert gold is not None
        equal = None if table.cells[i].equal_budget or names[i] == grid.baseline else _equal(table, i, family, spent)
        found.append(
            Point(
                table.cells[i],
                int(np.isfinite(table.gold[i]).sum()),
                gold,
                tokens,
                float(np.nanmean(table.seconds[i])),
                None if names[i] == grid.baseline else table.mean(table.gold[i] - base),
                None if greedy is None or names[i] == grid.greedy else table.mean(table.gold[i] - greedy),
                equal,
            )
        )
    found.sort(key=lambda point: (point.tokens, -point.gold.value))
    return _marked(found)


def _marked(found: Sequence[Point]) -> list[Point]:
    """With the fronts: each that is better than everything cheaper."""
    fronts: dict[str, set[Cost]] = {point.cell.name: set() for point in found}
    for cost in COSTS:
        best = -math.inf
        for point in sorted(found, key=lambda point: (getattr(point, cost), -point.gold.value)):
            if point.gold.value > best:
                best = point.gold.value
                fronts[point.cell.name].add(cost)
    return [replace(point, fronts=frozenset(fronts[point.cell.name])) for point in found]


def _equal(table: Table, i: int, family: Sequence[int], spent: Mapping[int, float]) -> Mean | None:
    """The difference to the family at the same tokens: between its two neighbours, linear in the logarithm of the tokens.

    None outside of the family's range by more than a tenth: there is nothing to compare with.
    """
    if len(family) < 2 or not 0.9 * spent[family[0]] <= spent[i] <= 1.1 * spent[family[-1]]:
        return None
    place = min(max(spent[i], spent[family[0]]), spent[family[-1]])
    above = next(j for j, member in enumerate(family) if spent[member] >= place)
    low, high = family[max(0, above - 1)], family[above]
    wide = math.log(spent[high] / spent[low]) if spent[high] > spent[low] else 1.0
    share = math.log(place / spent[low]) / wide
    return table.mean(table.gold[i] - (1 - share) * table.gold[low] - share * table.gold[high])


def advice(table: Table, found: Sequence[Point], seed: int = 0, cost: Cost = "tokens") -> list[Advice]:
    """For each budget at which the choice changes: what to use, how sure that is, and what is cheaper and hardly worse."""
    names = [cell.name for cell in table.cells]
    rows = {point.cell.name: table.gold[names.index(point.cell.name)] for point in found}
    common = np.isfinite(np.array(list(rows.values()))).all(axis=0)
    if not common.any():
        return []
    prompts = int(common.sum())
    drawn = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=REPLICATES)
    spent = {point.cell.name: getattr(point, cost) for point in found}
    ordered = sorted(found, key=lambda point: spent[point.cell.name])
    given = []
    for point in (point for point in ordered if cost in point.fronts):
        limit = spent[point.cell.name]
        within = [other for other in ordered if spent[other.cell.name] <= limit]
        means = drawn @ np.array([rows[other.cell.name][common] for other in within]).T
        chance = float((means.argmax(axis=1) == within.index(point)).mean())
        cheap = (other for other in within if spent[other.cell.name] < 0.9 * limit and _hardly_worse(table, rows, other, point))
        given.append(Advice(limit, point.cell.name, point.gold, chance, next((other.cell.name for other in cheap), None)))
    return given


def _hardly_worse(table: Table, rows: Mapping[str, Array], other: Point, point: Point) -> bool:
    difference = table.mean(rows[point.cell.name] - rows[other.cell.name])
    return difference is not None and not difference.value > ENOUGH * difference.error


def as_json(found: Sequence[Point], advised: Mapping[Cost, Sequence[Advice]]) -> dict[str, Any]:
    """Points and advice for a file; a mean is {value, error}, null where there is none."""
    settings = [
        {
            "name": point.cell.name, "align": point.cell.align, "body": dict(point.cell.body), "prompts": point.prompts,
            "tokens": point.tokens, "seconds": point.seconds, "kl_bound": point.cell.kl_bound, "fronts": sorted(point.fronts),
            **{name: _mean_json(getattr(point, name)) for name in ("gold", "minus_baseline", "minus_greedy", "minus_equal")},
        }
        for point in found
    ]  # fmt: skip
    given = {
        cost: [{"from": one.cost, "use": one.name, "chance": one.chance, "cheaper": one.cheaper} for one in choices]
        for cost, choices in advised.items()
    }
    return {"settings": settings, "advice": given}


def _mean_json(mean: Mean | None) -> dict[str, float | None] | None:
    return None if mean is None else {"value": mean.value, "error": mean.error if math.isfinite(mean.error) else None}
