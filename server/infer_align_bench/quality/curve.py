"""What the scored answers say: means with standard errors, differences by prompt, and the Pareto front.

Prompts are what is drawn from a population, so errors are over prompts: the draws of one prompt are averaged first. Differences are
taken prompt by prompt, over the prompts that both settings have. Only settings that were scored at every prompt are compared with
all others: one that lacks a few hard prompts would look better than it is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from infer_align_bench.quality.cells import Row
from infer_align_bench.quality.grid import Cell, Grid

Array = NDArray[np.float64]
Cost = Literal["tokens", "seconds"]
COSTS: tuple[Cost, ...] = ("tokens", "seconds")


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
    tokens: (
        Mean | None
    )  # all that an answer costs: prompt, generated, rewards' and judge's; None where the endpoint does not say
    generated: Mean | None  # completion tokens alone
    seconds: Mean
    kl_bound: float | None
    minus_baseline: Mean | None
    minus_greedy: Mean | None
    minus_equal: Mean | None  # against the equal-budget family at the same tokens
    missing: int = 0  # prompts that others have and this has not: then it is on no front
    fronts: frozenset[Cost] = frozenset()  # the costs of which nothing cheaper is better

    @property
    def front(self) -> bool:
        """Whether nothing is better for fewer tokens."""
        return "tokens" in self.fronts

    def cost(self, of: Cost) -> float:
        """Its mean cost; NaN where it is not known."""
        mean: Mean | None = getattr(self, of)
        return math.nan if mean is None else mean.value

    def comparable(self, cost: Cost) -> bool:
        """Whether it can stand beside all others."""
        return not self.missing and math.isfinite(self.cost(cost))


class Table:
    """Gold, tokens, generated tokens and seconds by setting and prompt; NaN where there is nothing. [cells, prompts].

    `pending` are prompts that have not been asked under every setting yet: they are not held against those that lack them.
    """

    def __init__(
        self,
        grid: Grid,
        rows: Iterable[Row],
        keys: Mapping[tuple[str, int], str],
        pending: Collection[int] = (),
        shared: Collection[str] = (),
    ) -> None:
        self.cells = list(grid.cells)
        self.shared = shared  # fields of the body that every request has
        at = {cell.name: i for i, cell in enumerate(self.cells)}
        prompts = 1 + max((prompt for _, prompt in keys), default=-1)
        places: dict[str, list[tuple[int, int]]] = {}  # one answer serves all that asked the same
        for (name, prompt), key in keys.items():
            places.setdefault(key, []).append((at[name], prompt))
        sums = np.zeros((5, len(self.cells), prompts))
        for row in rows:
            if row.gold is None:
                continue
            generated = math.nan if row.spent is None else row.spent
            for place in places.get(row.key, ()):
                sums[(slice(None), *place)] += (row.gold, row.tokens, generated, row.seconds, 1.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            self.gold, self.tokens, self.generated, self.seconds = (
                part / sums[4] for part in sums[:4]
            )
        self.required = np.isfinite(self.gold).any(axis=0)
        self.required[[prompt for prompt in pending if prompt < prompts]] = False

    def mean(self, values: Array) -> Mean | None:
        """Over the prompts that have a value."""
        present = values[np.isfinite(values)]
        if not present.size:
            return None
        error = (
            float(present.std(ddof=1) / math.sqrt(present.size)) if present.size > 1 else math.nan
        )
        return Mean(float(present.mean()), error)


def points(table: Table, grid: Grid) -> list[Point]:
    """Every setting that has been measured, cheapest first."""
    names = [cell.name for cell in table.cells]
    base = table.gold[names.index(grid.baseline)]
    greedy = table.gold[names.index(grid.greedy)] if grid.greedy else None
    found = []
    for i, cell in enumerate(table.cells):
        gold, seconds = table.mean(table.gold[i]), table.mean(table.seconds[i])
        if gold is None or seconds is None:
            continue
        found.append(
            Point(
                cell,
                int(np.isfinite(table.gold[i]).sum()),
                gold,
                table.mean(table.tokens[i]),
                table.mean(table.generated[i]),
                seconds,
                cell.kl_bound(table.shared),
                None if cell.name == grid.baseline else table.mean(table.gold[i] - base),
                None
                if greedy is None or cell.name == grid.greedy
                else table.mean(table.gold[i] - greedy),
                None,
                int((table.required & ~np.isfinite(table.gold[i])).sum()),
            )
        )
    found.sort(
        key=lambda point: (np.nan_to_num(point.cost("tokens"), nan=math.inf), -point.gold.value)
    )
    return _marked(_beside_the_family(table, grid, found))


def _marked(found: Sequence[Point]) -> list[Point]:
    """With the fronts: each that is better than everything cheaper."""
    fronts: dict[str, set[Cost]] = {point.cell.name: set() for point in found}
    for cost in COSTS:
        best = -math.inf
        comparable = [point for point in found if point.comparable(cost)]
        for point in sorted(comparable, key=lambda point: (point.cost(cost), -point.gold.value)):
            if point.gold.value > best:
                best = point.gold.value
                fronts[point.cell.name].add(cost)
    return [replace(point, fronts=frozenset(fronts[point.cell.name])) for point in found]


def _beside_the_family(table: Table, grid: Grid, found: Sequence[Point]) -> list[Point]:
    """With the difference to the equal-budget family, of which the baseline is one."""
    at = {cell.name: i for i, cell in enumerate(table.cells)}
    members = {
        point.cell.name
        for point in found
        if point.cell.equal_budget or point.cell.name == grid.baseline
    }
    spent = {
        at[point.cell.name]: point.cost("tokens")
        for point in found
        if point.comparable("tokens") and point.cost("tokens") > 0
    }
    family = sorted((i for i in spent if table.cells[i].name in members), key=lambda i: spent[i])
    return [
        point
        if point.cell.name in members or at[point.cell.name] not in spent
        else replace(point, minus_equal=_equal(table, at[point.cell.name], family, spent))
        for point in found
    ]


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
