"""Figures of a judge on pairs of answers whose better one is given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Two texts whose lengths differ by a smaller share are of equal length.
LENGTH_MATCHED = 0.1
# A difference of fewer standard errors is no difference.
ERRORS = 2.0
LABELS = ("A", "B", "C")


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """The answer of /v1/align/judge on (chosen, rejected)."""

    prompt: str  # pairs of one prompt are not independent
    chosen: str
    rejected: str
    answer: Mapping[str, Any]

    @property
    def by_scores(self) -> float | None:
        """Return 1 if the chosen answer has the higher score, 0.5 for a tie, None without one."""
        first, second = (candidate["score"] for candidate in self.answer["candidates"])
        if first is None or second is None:
            return None
        return 0.5 if first == second else float(first > second)

    @property
    def by_comparison(self) -> float | None:
        """Return 1 if the chosen answer wins the comparison, 0.5 for a tie; None without one."""
        points = {"larger": 1.0, "equal": 0.5, "smaller": 0.0}
        related = [pair["relation"] for pair in self.answer["pairs"]]
        return points.get(related[0]) if related else None

    @property
    def error(self) -> str | None:
        """Return the reason why a score or the comparison is missing; None if neither is."""
        for part in (*self.answer["candidates"], *self.answer["pairs"]):
            if part["error"]:
                return str(part["error"])
        return None

    @property
    def orders(self) -> Sequence[Mapping[str, float]]:
        """Return the label probabilities of both orders; () if there are none."""
        orders: list[Mapping[str, float]] = []
        for pair in self.answer["pairs"]:
            orders += pair["orders"]
        return orders if len(orders) == 2 and all(orders) else ()

    @property
    def is_length_matched(self) -> bool:
        """Return True if both answers are about as long."""
        first, second = len(self.chosen), len(self.rejected)
        return abs(first - second) <= LENGTH_MATCHED * max(first, second)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A share of right pairs with its standard error over prompts."""

    value: float
    error: float | None  # None with one prompt, which shows no error
    pairs: int
    ties: float  # share of ties, each of which counts half

    @property
    def verdict(self) -> str:
        """Return the sentence that a reader needs."""
        if self.error is None:
            return "no better than chance"
        lead = self.value - 0.5
        # Few pairs that are all right or all wrong have no spread. Guessing has this one.
        error = max(self.error, 0.5 / math.sqrt(self.pairs))
        if lead > ERRORS * error:
            return "better than chance"
        if lead < -ERRORS * error:
            return "worse than chance"
        return "no better than chance"


def accuracy(points: Sequence[float], prompts: Sequence[str]) -> Accuracy | None:
    """Return the mean of points (1, 0.5 or 0 per pair); None without points.

    The standard error treats all pairs of one prompt as one observation. With one prompt there is
    none.
    """
    if not points:
        return None
    mean = sum(points) / len(points)
    sums: dict[str, float] = {}
    for prompt, point in zip(prompts, points, strict=True):
        sums[prompt] = sums.get(prompt, 0.0) + point - mean
    clusters = len(sums)
    error = None
    if clusters > 1:
        squares = sum(total**2 for total in sums.values())
        error = math.sqrt(squares * clusters / (clusters - 1)) / len(points)
    ties = sum(point == 0.5 for point in points) / len(points)
    return Accuracy(mean, error, len(points), ties)


def accuracies(pairs: Sequence[JudgedPair]) -> dict[str, Accuracy | None]:
    """Return the accuracy of scores, of comparisons and of the longer answer."""
    matched = [pair for pair in pairs if pair.is_length_matched]
    return {
        "scores": _accuracy_by("by_scores", pairs),
        "scores, equal length": _accuracy_by("by_scores", matched),
        "comparisons": _accuracy_by("by_comparison", pairs),
        "comparisons, equal length": _accuracy_by("by_comparison", matched),
        "the longer answer": _longer(pairs),
    }


def _accuracy_by(attribute: str, pairs: Sequence[JudgedPair]) -> Accuracy | None:
    points: list[float] = []
    prompts: list[str] = []
    for pair in pairs:
        point = getattr(pair, attribute)
        if point is not None:
            points.append(point)
            prompts.append(pair.prompt)
    return accuracy(points, prompts)


def _longer(pairs: Sequence[JudgedPair]) -> Accuracy | None:
    points: list[float] = []
    for pair in pairs:
        first, second = len(pair.chosen), len(pair.rejected)
        points.append(0.5 if first == second else float(first > second))
    return accuracy(points, [pair.prompt for pair in pairs])


def biases(pairs: Sequence[JudgedPair]) -> dict[str, float | None]:
    """Return what the judge prefers apart from the texts.

    "position": mean of P(first answer) - P(second answer). "order": share of pairs whose likelier
    answer changes with the order. "label A" to "label C": mean probability of each label; the first
    answer has the label A, so a preference for a label and one for a position look the same.
    "conflict": share of pairs whose scores and comparison disagree.
    """
    readings: list[Mapping[str, float]] = []
    leads: list[float] = []
    order_changes: list[float] = []
    conflicts: list[float] = []
    for pair in pairs:
        if pair.orders:
            first, second = pair.orders
            readings += (first, second)
            leads += (_lead(first), _lead(second))
            # The lead of the answer that is shown first has one sign in both orders if the judge
            # follows the place.
            order_changes.append(float(_lead(first) * _lead(second) > 0))
        if pair.by_scores is not None and pair.by_comparison is not None:
            conflicts.append(float(pair.by_scores != pair.by_comparison))
    figures: dict[str, float | None] = {"position": _mean(leads), "order": _mean(order_changes)}
    for label in LABELS:
        figures[f"label {label}"] = _mean([order.get(label, 0.0) for order in readings])
    return {**figures, "conflict": _mean(conflicts)}


def _lead(order: Mapping[str, float]) -> float:
    """Return how much likelier the first answer is than the second, -1..1."""
    first, second = order.get("A", 0.0), order.get("B", 0.0)
    total = first + second + order.get("C", 0.0)
    return (first - second) / total if total else 0.0


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
