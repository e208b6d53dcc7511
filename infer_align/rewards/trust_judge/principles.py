"""Read answers by several criteria, each in prompts of its own.

    principles = [{text = "brief", weight = 2.0}, {text = "ironic", negate = true}]

    mode "score":     one prompt per criterion and answer
    mode "pairwise":  two prompts per criterion and pair: one in each order

All prompts are sent at once. A criterion stands where `criteria` stands for a judge without
principles, so that a judge reads a principle as it reads its own criteria.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

from infer_align.methods.trust_judge import Readout
from infer_align.rewards.trust_judge.criteria import Criterion, Objective
from infer_align.rewards.trust_judge.judge import Judge
from infer_align.rewards.trust_judge.ratings import Ratings, first_error
from infer_align.rewards.trust_judge.readings import Rule, expected_score
from infer_align.rewards.trust_judge.tournament import (
    Comparisons,
    Pair,
    compare_pairs,
    related_by,
    win_chance,
)
from infer_align.types import Messages


@dataclass(frozen=True, slots=True)
class Reader:
    """One judge and the way its answers are read."""

    judge: Judge  # its criteria are replaced by each criterion
    scale: int
    readout: Readout
    rule: Rule
    tolerance: float

    async def rate(
        self, messages: Messages, answers: Sequence[str], objective: Objective
    ) -> Ratings:
        """Score the answers by all criteria of an objective."""
        tasks = [self._rate_by(criterion, messages, answers) for criterion in objective.criteria]
        parts = tuple(await asyncio.gather(*tasks))
        if objective.is_plain:
            return parts[0]
        scores: list[float] = []
        for column in zip(*(part.scores for part in parts), strict=True):
            scores.append(objective.score(column, self.scale))
        errors = [first_error(parts, i) for i in range(len(answers))]
        return Ratings(tuple(scores), tuple(errors), parts=parts)

    async def compare(
        self,
        messages: Messages,
        answers: Sequence[str],
        pairs: Sequence[Pair],
        objective: Objective,
    ) -> Comparisons:
        """Compare pairs of answers by all criteria of an objective, in both orders."""
        tasks: list[Coroutine[Any, Any, Comparisons]] = []
        for criterion in objective.criteria:
            judge = self._judge_by(criterion)
            tasks.append(compare_pairs(judge, messages, answers, pairs, self.rule, self.tolerance))
        parts = tuple(await asyncio.gather(*tasks))
        if objective.is_plain:
            return parts[0]
        return self._combined(parts, pairs, objective)

    async def _rate_by(
        self, criterion: Criterion, messages: Messages, answers: Sequence[str]
    ) -> Ratings:
        judgements = await self._judge_by(criterion).scores(messages, answers, self.scale)
        scores: list[float] = []
        for judgement in judgements:
            if judgement.reading is None:
                scores.append(math.nan)
            else:
                scores.append(expected_score(judgement.reading.probs, self.scale, self.readout))
        errors = tuple(judgement.error for judgement in judgements)
        return Ratings(tuple(scores), errors, tuple(judgements))

    def _judge_by(self, criterion: Criterion) -> Judge:
        return replace(self.judge, criteria=criterion.text)

    def _combined(
        self, parts: Sequence[Comparisons], pairs: Sequence[Pair], objective: Objective
    ) -> Comparisons:
        """Combine the comparisons by each criterion into one for the objective."""
        combined = Comparisons(parts=tuple(parts))
        for pair in pairs:
            errors = [part.errors[pair] for part in parts if pair in part.errors]
            if errors:
                combined.errors[pair] = errors[0]
                continue
            chances = [win_chance(part, pair, self.rule) for part in parts]
            combined.chances[pair] = objective.chance(chances)
            combined.relations[pair] = related_by(combined.chances[pair], self.tolerance)
        return combined
