"""Several judges of the same answers, and how each of them differs from the others.

    [rewards.trust_judge]
    kind = "trust_judge"
    panel = ["served", "critic"]        # engines; each judge reads the same prompts

The judges are the members of the reward, so that `ensemble` decides how their scores become one.

    lean            how much higher a judge scores than the others do, on 1..5
    position_bias   how much likelier a judge prefers an answer because it is shown first, -1..1
    agreement       share of pairs in which a judge and the others prefer the same answer
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infer_align.rewards.trust_judge.criteria import Objective
from infer_align.rewards.trust_judge.principles import Reader
from infer_align.rewards.trust_judge.ratings import Ratings, first_error
from infer_align.rewards.trust_judge.readings import Reading
from infer_align.rewards.trust_judge.tournament import (
    Comparisons,
    Pair,
    Schedule,
    related_by,
    run_schedule,
    win_chance,
)
from infer_align.types import Array, Messages


@dataclass(frozen=True, slots=True)
class JudgePanel:
    """Judges that read the same answers by the same criteria; often only one."""

    readers: Mapping[str, Reader]

    @property
    def is_single(self) -> bool:
        """Return True if there is one judge, whose readings are those of the panel."""
        return len(self.readers) == 1

    async def rate(
        self, messages: Messages, answers: Sequence[str], objective: Objective
    ) -> Ratings:
        """Score the answers; the score of a panel is the mean over the judges that gave one."""
        tasks = [reader.rate(messages, answers, objective) for reader in self.readers.values()]
        parts = tuple(await asyncio.gather(*tasks))
        if self.is_single:
            return parts[0]
        scores: list[float] = []
        errors: list[str | None] = []
        for i in range(len(answers)):
            score = _mean([part.scores[i] for part in parts])
            scores.append(score)
            errors.append(first_error(parts, i) if math.isnan(score) else None)
        return Ratings(tuple(scores), tuple(errors), parts=parts)

    async def compare(
        self, messages: Messages, answers: Sequence[str], objective: Objective, schedule: Schedule
    ) -> Comparisons:
        """Compare the answers two at a time; all judges compare the same pairs."""

        async def compare(pairs: Sequence[Pair]) -> Comparisons:
            readers = self.readers.values()
            tasks = [each.compare(messages, answers, pairs, objective) for each in readers]
            parts = tuple(await asyncio.gather(*tasks))
            return parts[0] if self.is_single else self._combined(parts, pairs)

        return await run_schedule(schedule, len(answers), compare)

    def _combined(self, parts: tuple[Comparisons, ...], pairs: Sequence[Pair]) -> Comparisons:
        """Return the mean chance over the judges that compared a pair."""
        [first, *_] = self.readers.values()
        combined = Comparisons(parts=parts)
        for pair in pairs:
            chances: list[float] = []
            for part in parts:
                if pair in part.relations:
                    chances.append(win_chance(part, pair, first.rule))
            if not chances:
                combined.errors[pair] = parts[0].errors[pair]
                continue
            combined.chances[pair] = sum(chances) / len(chances)
            combined.relations[pair] = related_by(combined.chances[pair], first.tolerance)
        return combined


def position_bias(readings: Sequence[tuple[Reading, Reading]]) -> float:
    """Return the mean of P(A) - P(B) over both orders of all pairs; NaN without readings.

    A is the answer that is shown first. A judge without a bias has 0, one that always prefers the
    first answer has 1.
    """
    leads: list[float] = []
    for reading in itertools.chain.from_iterable(readings):
        labels = dict(reading.probs)
        first = labels.get("A", 0.0)
        second = labels.get("B", 0.0)
        total = first + second + labels.get("C", 0.0)
        if total > 0:
            leads.append((first - second) / total)
    return sum(leads) / len(leads) if leads else math.nan


def score_statistics(names: Sequence[str], values: Array) -> dict[str, dict[str, Any]]:
    """Return the lean and the agreement of each judge from its scores.

    Args:
        names: the K judges.
        values: [K, N] scores on 1..5; NaN is not scored.
    """
    statistics: dict[str, dict[str, Any]] = {}
    for k, name in enumerate(names):
        rest = [_mean(column) for column in np.delete(values, k, axis=0).T]
        differences = values[k] - np.array(rest)
        compared = differences[~np.isnan(differences)]
        lean = float(compared.mean()) if len(compared) else None
        statistics[name] = {"lean": lean, "agreement": _agreement(values[k], rest)}
    return statistics


def comparison_statistics(
    names: Sequence[str], comparisons: Sequence[Comparisons]
) -> dict[str, dict[str, Any]]:
    """Return the position bias and the agreement of each judge from its comparisons."""
    statistics: dict[str, dict[str, Any]] = {}
    for k, name in enumerate(names):
        bias = position_bias(comparisons[k].readings)
        statistics[name] = {
            "position_bias": None if math.isnan(bias) else bias,
            "agreement": _agreement_of_relations(k, comparisons),
        }
    return statistics


def _agreement_of_relations(judge: int, comparisons: Sequence[Comparisons]) -> float | None:
    """Return the share of pairs in which a judge has the relation of the mean of the others."""
    rest = [part for k, part in enumerate(comparisons) if k != judge]
    same: list[bool] = []
    for pair, related in comparisons[judge].relations.items():
        chances = [part.chances.get(pair, 0.5) for part in rest if pair in part.relations]
        if chances:
            same.append(related == related_by(_mean(chances), 0.0))
    return sum(same) / len(same) if same else None


def _agreement(scores: Array, rest: Sequence[float]) -> float | None:
    """Return the share of pairs of answers that two lists of scores order alike."""
    same: list[bool] = []
    for i, j in itertools.combinations(range(len(rest)), 2):
        first = scores[i] - scores[j]
        second = rest[i] - rest[j]
        if not math.isnan(first + second):
            same.append(bool(np.sign(first) == np.sign(second)))
    return sum(same) / len(same) if same else None


def _mean(values: Sequence[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if all are."""
    present = [value for value in values if not math.isnan(value)]
    return sum(present) / len(present) if present else math.nan
