"""Statistics of scored answers: means with standard errors, paired differences, Pareto fronts.

Prompts are a sample of a population, so errors are over prompts: the draws of one prompt are
averaged first. Differences are computed prompt by prompt, over the prompts that both settings
have. Only settings with a score for every prompt are compared with all others: a setting without
scores for a few hard prompts would look better than it is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from infer_align_bench.quality.grid import Cell, Grid
from infer_align_bench.quality.notebook import ScoredAnswer

Array = NDArray[np.float64]
Cost = Literal["tokens", "seconds"]
COSTS: tuple[Cost, ...] = ("tokens", "seconds")
# A setting is compared with the equal-budget family up to this share outside its range of tokens.
FAMILY_MARGIN = 0.1


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean and its standard error over prompts."""

    value: float
    error: float

    @property
    def decimals(self) -> int:
        """Return the decimals to print: two significant digits of the error."""
        if not 0 < self.error < math.inf:
            return 2
        return max(0, 1 - math.floor(math.log10(self.error)))


@dataclass(frozen=True, slots=True)
class Point:
    """The quality and the cost of one setting."""

    cell: Cell
    # Number of prompts with a score.
    prompts: int
    gold: Mean
    # All tokens of an answer: prompt, generated and scoring; None if they were not counted.
    tokens: Mean | None
    # Completion tokens alone.
    generated: Mean | None
    seconds: Mean
    kl_bound: float | None
    # Estimated KL of a steered setting, in nats per answer.
    kl: Mean | None
    minus_baseline: Mean | None
    minus_greedy: Mean | None
    # Difference to the equal-budget family at the same tokens.
    minus_equal: Mean | None
    # Prompts without a score that other settings have; then the setting is on no front.
    missing: int = 0
    # Costs for which no cheaper setting is better.
    fronts: frozenset[Cost] = frozenset()

    @property
    def front(self) -> bool:
        """Return True if no setting is better for fewer tokens."""
        return "tokens" in self.fronts

    def cost(self, name: Cost) -> float:
        """Return the mean cost of an answer; NaN if it is unknown."""
        mean = self.tokens if name == "tokens" else self.seconds
        return math.nan if mean is None else mean.value

    def comparable(self, cost: Cost) -> bool:
        """Return True if the setting can be compared with all others at this cost."""
        return not self.missing and math.isfinite(self.cost(cost))


class Table:
    """Scores and costs by setting and prompt, [cells, prompts]; NaN where there are none."""

    def __init__(
        self,
        grid: Grid,
        rows: Iterable[ScoredAnswer],
        keys: Mapping[tuple[str, int], str],
        pending: Collection[int] = (),
        shared: Collection[str] = (),
    ) -> None:
        """Average the rows over draws.

        Args:
            grid: the settings.
            rows: of the notebook.
            keys: the digest of each setting's name and prompt.
            pending: prompts that were not yet answered under every setting. A setting without a
                score for them still counts as complete.
            shared: body fields that every request has.
        """
        self.cells = list(grid.cells)
        self.shared = shared
        prompts = 1 + max((prompt for _, prompt in keys), default=-1)
        sums = self._sums(rows, self._places(keys), prompts)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = sums[:-1] / sums[-1]
        self.gold, self.tokens, self.generated, self.seconds, self.kl = means
        # Prompts for which every setting should have a score.
        self.required = np.isfinite(self.gold).any(axis=0)
        for prompt in pending:
            if prompt < prompts:
                self.required[prompt] = False

    def _places(self, keys: Mapping[tuple[str, int], str]) -> dict[str, list[tuple[int, int]]]:
        """Return the (cell, prompt) indices of each digest: equal requests share an answer."""
        indices = {cell.name: i for i, cell in enumerate(self.cells)}
        places: dict[str, list[tuple[int, int]]] = {}
        for (name, prompt), key in keys.items():
            places.setdefault(key, []).append((indices[name], prompt))
        return places

    def _sums(
        self,
        rows: Iterable[ScoredAnswer],
        places: Mapping[str, list[tuple[int, int]]],
        prompts: int,
    ) -> Array:
        """Return sums of gold, tokens, generated tokens, seconds and KL, and the number of rows."""
        sums = np.zeros((6, len(self.cells), prompts))
        for row in rows:
            if row.gold is None:
                continue
            generated = math.nan if row.spent is None else row.spent
            kl = math.nan if row.kl is None else row.kl
            figures = (row.gold, row.tokens, generated, row.seconds, kl, 1.0)
            for cell, prompt in places.get(row.key, ()):
                sums[:, cell, prompt] += figures
        return sums

    def index(self, name: str) -> int:
        """Return the index of a setting."""
        return [cell.name for cell in self.cells].index(name)

    def mean(self, values: Array) -> Mean | None:
        """Return the mean over the prompts that have a value; None if there are none."""
        present = values[np.isfinite(values)]
        if not present.size:
            return None
        error = math.nan
        if present.size > 1:
            error = float(present.std(ddof=1) / math.sqrt(present.size))
        return Mean(float(present.mean()), error)


def make_points(table: Table, grid: Grid) -> list[Point]:
    """Return every measured setting, cheapest first."""
    points = []
    for i in range(len(table.cells)):
        point = _point(table, grid, i)
        if point is not None:
            points.append(point)
    points.sort(key=partial(_order, cost="tokens"))
    return _with_fronts(_with_family_differences(table, grid, points))


def _order(point: Point, cost: Cost) -> tuple[float, float]:
    """Return the sort key: cheapest first, then best first; unknown costs last."""
    value = point.cost(cost)
    return (math.inf if math.isnan(value) else value, -point.gold.value)


def _point(table: Table, grid: Grid, i: int) -> Point | None:
    """Return the point of the setting with index `i`; None if it has no score."""
    cell = table.cells[i]
    gold = table.mean(table.gold[i])
    seconds = table.mean(table.seconds[i])
    if gold is None or seconds is None:
        return None
    scored = np.isfinite(table.gold[i])
    return Point(
        cell=cell,
        prompts=int(scored.sum()),
        gold=gold,
        tokens=table.mean(table.tokens[i]),
        generated=table.mean(table.generated[i]),
        seconds=seconds,
        kl_bound=cell.kl_bound(table.shared),
        kl=table.mean(table.kl[i]) if cell.is_steered else None,
        minus_baseline=_difference(table, i, grid.baseline),
        minus_greedy=_difference(table, i, grid.greedy),
        minus_equal=None,
        missing=int((table.required & ~scored).sum()),
    )


def _difference(table: Table, i: int, reference: str | None) -> Mean | None:
    """Return the mean gold difference to a reference; None for the reference itself."""
    if reference is None or table.cells[i].name == reference:
        return None
    return table.mean(table.gold[i] - table.gold[table.index(reference)])


def _with_fronts(points: Sequence[Point]) -> list[Point]:
    """Mark the Pareto front of each cost: every setting that is better than all cheaper ones."""
    fronts: dict[str, set[Cost]] = {point.cell.name: set() for point in points}
    for cost in COSTS:
        comparable = [point for point in points if point.comparable(cost)]
        comparable.sort(key=partial(_order, cost=cost))
        best = -math.inf
        for point in comparable:
            if point.gold.value > best:
                best = point.gold.value
                fronts[point.cell.name].add(cost)
    return [replace(point, fronts=frozenset(fronts[point.cell.name])) for point in points]


def _with_family_differences(table: Table, grid: Grid, points: Sequence[Point]) -> list[Point]:
    """Add the difference to the equal-budget family, which includes the baseline."""
    members = set()
    spent = {}
    for point in points:
        index = table.index(point.cell.name)
        if point.cell.equal_budget or point.cell.name == grid.baseline:
            members.add(index)
        if point.comparable("tokens") and point.cost("tokens") > 0:
            spent[index] = point.cost("tokens")
    family = sorted((index for index in spent if index in members), key=lambda i: spent[i])
    result = []
    for point in points:
        index = table.index(point.cell.name)
        difference = None
        if index not in members and index in spent:
            difference = _family_difference(table, index, family, spent)
        result.append(replace(point, minus_equal=difference))
    return result


def _family_difference(
    table: Table, i: int, family: Sequence[int], spent: Mapping[int, float]
) -> Mean | None:
    """Return the gold difference to the family at the same tokens.

    The family's gold is interpolated between the two neighbours, linearly in the logarithm of the
    tokens. Outside the family's range, by more than a margin, there is nothing to compare with.

    Args:
        table: the scores.
        i: index of the setting.
        family: indices of the family, cheapest first.
        spent: mean tokens by index.
    """
    if len(family) < 2:
        return None
    lowest = spent[family[0]]
    highest = spent[family[-1]]
    if not (1 - FAMILY_MARGIN) * lowest <= spent[i] <= (1 + FAMILY_MARGIN) * highest:
        return None
    tokens = min(max(spent[i], lowest), highest)
    above = 0
    while spent[family[above]] < tokens:
        above += 1
    low = family[max(0, above - 1)]
    high = family[above]
    width = math.log(spent[high] / spent[low]) if spent[high] > spent[low] else 1.0
    weight = math.log(tokens / spent[low]) / width
    return table.mean(table.gold[i] - (1 - weight) * table.gold[low] - weight * table.gold[high])
