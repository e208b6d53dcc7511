"""Choose which answers are compared, compare them, and compute their win rates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Awaitable, Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from infer_align.rewards.trust_judge.judge import Judge
from infer_align.rewards.trust_judge.judgement import Judgement
from infer_align.rewards.trust_judge.readings import (
    EQUAL,
    LARGER,
    SMALLER,
    Reading,
    Relation,
    Rule,
    merge,
    relation,
)
from infer_align.types import Array, Messages, ScoringUsage

Pair = tuple[int, int]
Schedule = Literal["round_robin", "swiss"]

_POINTS = {LARGER: 1.0, EQUAL: 0.5, SMALLER: 0.0}
# Chances nearer to 0.5 than this are equal: their difference is the rounding of a sum.
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Comparisons:
    """Pairs (i, j), i < j, the relation of i to j, and the chance of i to be the better one.

    A pair that could not be judged has an error and no relation. The comparisons of one judge by
    one criterion have their readings in `orders`. Those of several criteria or judges have `parts`.
    """

    orders: dict[Pair, tuple[Judgement, Judgement]] = field(default_factory=dict)
    relations: dict[Pair, Relation] = field(default_factory=dict)
    errors: dict[Pair, str] = field(default_factory=dict)
    chances: dict[Pair, float] = field(default_factory=dict)
    parts: tuple[Comparisons, ...] = ()

    @property
    def pairs(self) -> list[Pair]:
        """Return the compared pairs, those that could not be judged included."""
        return list(self.orders) or sorted({*self.relations, *self.errors})

    @property
    def spent(self) -> ScoringUsage:
        """Return the usage of both orders of all pairs."""
        judgements = itertools.chain.from_iterable(self.orders.values())
        spent = sum((judgement.spent for judgement in judgements), ScoringUsage())
        return sum((part.spent for part in self.parts), spent)

    @property
    def readings(self) -> list[tuple[Reading, Reading]]:
        """Return the readings of both orders of each judged pair, of all parts."""
        readings: list[tuple[Reading, Reading]] = []
        for order1, order2 in self.orders.values():
            if order1.reading is not None and order2.reading is not None:
                readings.append((order1.reading, order2.reading))
        for part in self.parts:
            readings += part.readings
        return readings

    def points(self, item: int) -> list[float]:
        """Return the item's points in each judged pair.

        A win is 1 point, a tie 0.5, a loss 0.
        """
        points: list[float] = []
        for pair, compared in self.relations.items():
            if item not in pair:
                continue
            if compared == EQUAL:
                points.append(0.5)
            else:
                winner = pair[0] if compared == LARGER else pair[1]
                points.append(float(winner == item))
        return points

    def win_rate(self, item: int) -> float:
        """Return the item's mean points over its judged pairs, or NaN if it has none."""
        points = self.points(item)
        return sum(points) / len(points) if points else math.nan

    def win_rates(self, n: int) -> list[float]:
        """Return the win rate of each of n answers."""
        return [self.win_rate(item) for item in range(n)]

    def win_probabilities(self, n: int) -> Array:
        """Return the probability of each of n answers to beat each other one: [n, n].

        A tie counts half for each. A pair that was not judged is NaN.
        """
        matrix = np.full((n, n), np.nan)
        np.fill_diagonal(matrix, 0.5)
        for (i, j), chance in self.chances.items():
            matrix[i, j] = chance
            matrix[j, i] = 1.0 - chance
        return matrix

    def merged(self, other: Comparisons) -> Comparisons:
        """Return these comparisons and the other ones together."""
        parts = self.parts or other.parts
        if self.parts and other.parts:
            parts = tuple(a.merged(b) for a, b in zip(self.parts, other.parts, strict=True))
        return Comparisons(
            {**self.orders, **other.orders},
            {**self.relations, **other.relations},
            {**self.errors, **other.errors},
            {**self.chances, **other.chances},
            parts,
        )


# Compares the given pairs of answers.
Compare = Callable[[Sequence[Pair]], Awaitable[Comparisons]]


async def run_schedule(schedule: Schedule, n: int, compare: Compare) -> Comparisons:
    """Compare n answers two at a time, by a schedule."""
    return await (swiss if schedule == "swiss" else round_robin)(n, compare)


async def round_robin(n: int, compare: Compare) -> Comparisons:
    """Compare every pair of n answers at once, with n (n - 1) readings."""
    return await compare(list(itertools.combinations(range(n), 2)))


async def swiss(n: int, compare: Compare) -> Comparisons:
    """Compare n answers in ceil(log2 n) + 1 rounds, with about n (log2 n + 1) readings.

    Each round compares neighbours in the standings that were not compared yet. If n is odd, the
    last one in the standings that had no bye yet gets a bye, which counts as a win. A judge without
    cycles and ties finds the best answer. The second place, and which pairs are compared, depend on
    the order of equal answers.
    """
    comparisons = Comparisons()
    byes: set[int] = set()
    for _ in range(_rounds(n)):
        standings = _standings(comparisons, byes, n)
        if n % 2:
            bye = _next_bye(standings, byes)
            byes.add(bye)
            standings.remove(bye)
        pairs = _pair_neighbours(standings, {*comparisons.pairs})
        if not pairs:
            break
        comparisons = comparisons.merged(await compare(pairs))
    return comparisons


def max_readings(n: int, schedule: Schedule) -> int:
    """Return the maximum number of readings for n answers: two per pair."""
    if schedule == "round_robin":
        return n * (n - 1)
    return 2 * (n // 2) * _rounds(n)


def _rounds(n: int) -> int:
    return math.ceil(math.log2(n)) + 1 if n > 1 else 0


def _standings(comparisons: Comparisons, byes: set[int], n: int) -> list[int]:
    """Return the n answers in order of their points, a bye included, most points first."""
    points = [sum(comparisons.points(item)) + (item in byes) for item in range(n)]
    return sorted(range(n), key=lambda item: -points[item])


def _next_bye(standings: list[int], byes: set[int]) -> int:
    """Return the last answer in the standings without a bye, or the last one if all had one."""
    for item in reversed(standings):
        if item not in byes:
            return item
    return standings[-1]


def _pair_neighbours(standings: Iterable[int], compared: Container[Pair]) -> list[Pair]:
    """Pair each answer with the next one in the standings that it was not compared with."""
    waiting = list(standings)
    pairs: list[Pair] = []
    while waiting:
        first = waiting.pop(0)
        for rival in waiting:
            pair = (min(first, rival), max(first, rival))
            if pair not in compared:
                waiting.remove(rival)
                pairs.append(pair)
                break
    return pairs


async def compare_pairs(
    judge: Judge,
    messages: Messages,
    answers: Sequence[str],
    pairs: Sequence[Pair],
    rule: Rule,
    tolerance: float,
) -> Comparisons:
    """Judge pairs in both orders and derive their relations and chances.

    Equal answers are a tie: both orders show the judge the same prompt, and readings of it differ
    by rounding or by the luck of votes alone.
    """
    judgements = await judge.comparisons(messages, answers, pairs)
    comparisons = Comparisons(dict(zip(pairs, judgements, strict=True)))
    for pair, (order1, order2) in comparisons.orders.items():
        reading1, reading2 = order1.reading, order2.reading
        if reading1 is None or reading2 is None:
            comparisons.errors[pair] = order1.error or order2.error or "not judged"
            continue
        if answers[pair[0]] == answers[pair[1]]:
            reading2 = reading1
        try:
            related = relation(reading1, reading2, rule, tolerance)
        except ValueError as error:
            comparisons.errors[pair] = str(error)
            continue
        comparisons.relations[pair] = related
        labels = merge(reading1, reading2)
        total = sum(labels.values())
        if total > 0:
            comparisons.chances[pair] = (labels["A"] + labels["C"] / 2) / total
    return comparisons


def win_chance(comparisons: Comparisons, pair: Pair, rule: Rule) -> float:
    """Return the chance of the first answer of a judged pair to be the better one.

    Under the rule "likelihood" it is read from the labels. The other rules decide for one answer
    or for a tie, so it is 1, 0 or 0.5.
    """
    if rule == "likelihood":
        return comparisons.chances.get(pair, 0.5)
    return _POINTS[comparisons.relations[pair]]


def related_by(chance: float, tolerance: float) -> Relation:
    """Return the relation that a chance stands for. A distance from 0.5 within it is a tie."""
    lead = chance - 0.5
    if abs(lead) <= max(tolerance, _ROUNDING):
        return EQUAL
    return LARGER if lead > 0 else SMALLER
