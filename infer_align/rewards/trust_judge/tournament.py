"""Choose which answers are compared, compare them, and compute their win rates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from infer_align.rewards.trust_judge.judge import Judge, Judgement
from infer_align.rewards.trust_judge.readings import (
    EQUAL,
    LARGER,
    Relation,
    Rule,
    merge,
    relation,
)
from infer_align.types import Array, Messages, ScoringUsage

Pair = tuple[int, int]
Schedule = Literal["round_robin", "swiss"]


@dataclass(frozen=True, slots=True)
class Comparisons:
    """Pairs (i, j), i < j, judged in both orders, and the relation of i to j.

    A pair that could not be judged has an error and no relation.
    """

    orders: Mapping[Pair, tuple[Judgement, Judgement]] = field(default_factory=dict)
    relations: Mapping[Pair, Relation] = field(default_factory=dict)
    errors: Mapping[Pair, str] = field(default_factory=dict)

    @property
    def spent(self) -> ScoringUsage:
        """The usage of both orders of all pairs."""
        judgements = itertools.chain.from_iterable(self.orders.values())
        return sum((judgement.spent for judgement in judgements), ScoringUsage())

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

    def win_probabilities(self, n: int) -> Array:
        """Return the probability of each of n answers to beat each other one: [n, n].

        It is read from the labels of both orders; a tie counts half for each. A pair that was not
        judged is NaN.
        """
        matrix = np.full((n, n), np.nan)
        np.fill_diagonal(matrix, 0.5)
        for i, j in self.relations:
            order1, order2 = self.orders[i, j]
            if order1.reading is None or order2.reading is None:
                continue
            labels = merge(order1.reading, order2.reading)
            total = sum(labels.values())
            if total > 0:
                matrix[i, j] = (labels["A"] + labels["C"] / 2) / total
                matrix[j, i] = 1.0 - matrix[i, j]
        return matrix

    def merged(self, other: Comparisons) -> Comparisons:
        """Return these comparisons and the other ones together."""
        return Comparisons(
            {**self.orders, **other.orders},
            {**self.relations, **other.relations},
            {**self.errors, **other.errors},
        )


async def round_robin(
    judge: Judge, messages: Messages, answers: list[str], rule: Rule, tolerance: float
) -> Comparisons:
    """Compare every pair of N answers at once, with N (N - 1) readings."""
    pairs = list(itertools.combinations(range(len(answers)), 2))
    return await _compare(judge, messages, answers, pairs, rule, tolerance)


async def swiss(
    judge: Judge, messages: Messages, answers: list[str], rule: Rule, tolerance: float
) -> Comparisons:
    """Compare N answers in ceil(log2 N) + 1 rounds, with about N (log2 N + 1) readings.

    Each round compares neighbours in the standings that were not compared yet. If N is odd, the
    last one in the standings that had no bye yet gets a bye, which counts as a win. A judge without
    cycles and ties finds the best answer. The second place, and which pairs are compared, depend on
    the order of equal answers.
    """
    comparisons = Comparisons()
    byes: set[int] = set()
    for _ in range(_rounds(len(answers))):
        standings = _standings(comparisons, byes, len(answers))
        if len(answers) % 2:
            bye = _next_bye(standings, byes)
            byes.add(bye)
            standings.remove(bye)
        pairs = _pair_neighbours(standings, comparisons.orders)
        if not pairs:
            break
        results = await _compare(judge, messages, answers, pairs, rule, tolerance)
        comparisons = comparisons.merged(results)
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


def _pair_neighbours(standings: Iterable[int], compared: Mapping[Pair, object]) -> list[Pair]:
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


async def _compare(
    judge: Judge,
    messages: Messages,
    answers: list[str],
    pairs: list[Pair],
    rule: Rule,
    tolerance: float,
) -> Comparisons:
    """Judge pairs in both orders and derive their relations."""
    judgements = await judge.comparisons(messages, answers, pairs)
    orders = dict(zip(pairs, judgements, strict=True))
    relations: dict[Pair, Relation] = {}
    errors: dict[Pair, str] = {}
    for pair, (order1, order2) in orders.items():
        if order1.reading is None or order2.reading is None:
            errors[pair] = order1.error or order2.error or "not judged"
            continue
        try:
            relations[pair] = relation(order1.reading, order2.reading, rule, tolerance)
        except ValueError as error:
            errors[pair] = str(error)
    return Comparisons(orders, relations, errors)
