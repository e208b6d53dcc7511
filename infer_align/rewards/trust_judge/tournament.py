"""Which answers are compared, and what their comparisons come to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from infer_align.rewards.trust_judge.asking import Judge, Judgement
from infer_align.rewards.trust_judge.readings import EQUAL, LARGER, Relation, Rule, relation
from infer_align.types import Messages, ScoringUsage

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Comparisons:
    """Pairs (i, j), i < j, in both orders, and how i compares to j; a pair that was not judged has no relation."""

    orders: Mapping[Pair, tuple[Judgement, Judgement]] = field(default_factory=dict)
    relations: Mapping[Pair, Relation] = field(default_factory=dict)
    errors: Mapping[Pair, str] = field(default_factory=dict)

    @property
    def spent(self) -> ScoringUsage:
        """Both orders of all pairs."""
        return sum(
            (judgement.spent for orders in self.orders.values() for judgement in orders),
            ScoringUsage(),
        )

    def win_rate(self, item: int) -> float:
        """Wins and half of the ties, over the pairs of the item that were judged; NaN where none was."""
        points = [
            _points(related, pair, item) for pair, related in self.relations.items() if item in pair
        ]
        return sum(points) / len(points) if points else math.nan


def _points(related: Relation, pair: Pair, item: int) -> float:
    return 0.5 if related == EQUAL else float((related == LARGER) == (pair[0] == item))


async def round_robin(
    judge: Judge, messages: Messages, answers: list[str], rule: Rule, tolerance: float
) -> Comparisons:
    """Every pair, all at once: N (N - 1) readings."""
    pairs = list(itertools.combinations(range(len(answers)), 2))
    return await _compare(judge, messages, answers, pairs, rule, tolerance)


async def swiss(
    judge: Judge, messages: Messages, answers: list[str], rule: Rule, tolerance: float
) -> Comparisons:
    """ceil(log2 N) + 1 rounds; in each, neighbours in the standings who have not met meet: about N (log2 N + 1) readings.

    Where N is odd, the last in the standings who has not yet been left out counts as a winner. A judge without cycles and ties
    finds the best; who comes second, and which pairs meet, depends on the order of equals.
    """
    found, byes = Comparisons(), set[int]()
    for _ in range(_rounds(len(answers))):
        pairs = _next_round(found, byes, len(answers))
        if not pairs:
            break
        met = await _compare(judge, messages, answers, pairs, rule, tolerance)
        found = Comparisons(
            {**found.orders, **met.orders},
            {**found.relations, **met.relations},
            {**found.errors, **met.errors},
        )
    return found


def most_readings(n: int, schedule: Literal["round_robin", "swiss"]) -> int:
    """Two per pair that the schedule lets n answers meet in."""
    return n * (n - 1) if schedule == "round_robin" else 2 * (n // 2) * _rounds(n)


def _rounds(n: int) -> int:
    return math.ceil(math.log2(n)) + 1 if n > 1 else 0


def _next_round(found: Comparisons, byes: set[int], n: int) -> list[Pair]:
    """Who meets next; who is left out is added to `byes`."""
    points = {
        i: sum(_points(related, pair, i) for pair, related in found.relations.items() if i in pair)
        for i in range(n)
    }
    waiting = sorted(range(n), key=lambda i: -(points[i] + (i in byes)))
    if n % 2:
        left_out = next((i for i in reversed(waiting) if i not in byes), waiting[-1])
        byes.add(left_out)
        waiting.remove(left_out)
    pairs: list[Pair] = []
    while waiting:
        first = waiting.pop(0)
        rival = next(
            (i for i in waiting if (min(first, i), max(first, i)) not in found.orders), None
        )
        if rival is not None:
            waiting.remove(rival)
            pairs.append((min(first, rival), max(first, rival)))
    return pairs


async def _compare(
    judge: Judge,
    messages: Messages,
    answers: list[str],
    pairs: list[Pair],
    rule: Rule,
    tolerance: float,
) -> Comparisons:
    orders = dict(zip(pairs, await judge.comparisons(messages, answers, pairs), strict=True))
    relations: dict[Pair, Relation] = {}
    errors: dict[Pair, str] = {}
    for pair, (one, two) in orders.items():
        if one.reading is None or two.reading is None:
            errors[pair] = one.error or two.error or "not judged"
            continue
        try:
            relations[pair] = relation(one.reading, two.reading, rule, tolerance)
        except ValueError as error:
            errors[pair] = str(error)
    return Comparisons(orders, relations, errors)
