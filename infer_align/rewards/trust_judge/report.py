"""The report of a judge as JSON: every reading by name, and how the judges of a panel differ.

`indices` are the numbers of the answers in the response.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from infer_align.rewards.trust_judge.consistency import cycles
from infer_align.rewards.trust_judge.criteria import Criterion, Objective, directed_score
from infer_align.rewards.trust_judge.panel import (
    JudgePanel,
    comparison_statistics,
    position_bias,
    score_statistics,
)
from infer_align.rewards.trust_judge.probes import NULL_ANSWERS
from infer_align.rewards.trust_judge.ratings import Ratings
from infer_align.rewards.trust_judge.readings import Reading, rescale
from infer_align.rewards.trust_judge.rubric import Rubric
from infer_align.rewards.trust_judge.tournament import Comparisons, Pair
from infer_align.types import Array

Json = dict[str, Any]


def rating_details(
    panel: JudgePanel, objective: Objective, ratings: Ratings, indices: Sequence[int], scale: int
) -> Json:
    """Return the scores by each principle, of each judge of a panel; {} if there is one of both."""
    if panel.is_single:
        return _principle_scores(objective, ratings, indices, scale)
    judges: Json = {}
    for name, part in zip(panel.readers, ratings.parts, strict=True):
        judges[name] = _principle_scores(objective, part, indices, scale)
    return {"judges": judges}


def comparison_details(
    panel: JudgePanel, objective: Objective, comparisons: Comparisons, indices: Sequence[int]
) -> Json:
    """Return the comparisons by each principle, of each judge of a panel; {} if one of both."""
    if panel.is_single:
        return _principle_comparisons(objective, comparisons, indices)
    statistics = comparison_statistics(list(panel.readers), comparisons.parts)
    judges: Json = {}
    for name, part in zip(panel.readers, comparisons.parts, strict=True):
        judges[name] = {
            **statistics[name],
            **_principle_comparisons(objective, part, indices),
        }
    return {"judges": judges}


def comparison_report(comparisons: Comparisons, indices: Sequence[int]) -> Json:
    """Return the relations, the win rates and the cycles of a tournament."""
    win_rates: dict[str, float] = {}
    for item, index in enumerate(indices):
        rate = comparisons.win_rate(item)
        if not math.isnan(rate):
            win_rates[str(index)] = rate
    compared: list[Json] = []
    for i, j in comparisons.pairs:
        related = comparisons.relations.get((i, j))
        compared.append({"pair": [indices[i], indices[j]], "relation": related})
    named_cycles: list[list[int]] = []
    for cycle in cycles(comparisons.relations):
        named_cycles.append([indices[i] for i in cycle])
    bias = position_bias(comparisons.readings)
    return {
        "comparisons": compared,
        "win_rates": win_rates,
        "cycles": named_cycles,
        "drop_rate": len(comparisons.errors) / max(1, len(comparisons.pairs)),
        "position_bias": None if math.isnan(bias) else bias,
    }


def rubric_report(rubric: Rubric) -> Json:
    """Return what the judge wrote, and if answers are judged by it."""
    rules = [{"text": rule.text, "hard": rule.hard} for rule in rubric.rules]
    probes: Json | None = None
    if rubric.probes is not None and rubric.probes.error is None:
        nulls = dict(zip(NULL_ANSWERS, rubric.probes.nulls, strict=True))
        probes = {"answer": rubric.probes.answer, "null_answers": nulls}
    return {
        "rules": rules,
        "accepted": rubric.accepted,
        "reason": rubric.reason,
        "labels": rubric.labels,
        "reproduced": rubric.reproduced,
        "probes": probes,
    }


def with_score_statistics(details: Json, values: Array) -> Json:
    """Return the details of a panel with the lean and the agreement of each judge.

    Args:
        details: of `rating_details`; without judges, they are returned as they are.
        values: [K, N] scores of the judges on 1..5.
    """
    if "judges" not in details:
        return details
    statistics = score_statistics(list(details["judges"]), values)
    judges: Json = {}
    for name, judge in details["judges"].items():
        judges[name] = {**judge, **statistics[name]}
    return {**details, "judges": judges}


def joined(first: Any, second: Any) -> Any:
    """Return the details of two calls as one: scores by answer are joined, all else is the same."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        merged = {**first, **second}
        for name in first.keys() & second.keys():
            merged[name] = joined(first[name], second[name])
        return merged
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        return [joined(a, b) for a, b in zip(first, second, strict=True)]
    return second


def _principle_scores(
    objective: Objective, ratings: Ratings, indices: Sequence[int], scale: int
) -> Json:
    if objective.is_plain:
        return {}
    principles: list[Json] = []
    for criterion, part in zip(objective.criteria, ratings.parts, strict=True):
        scores: dict[str, float | None] = {}
        for index, score in zip(indices, part.scores, strict=True):
            directed = rescale(directed_score(criterion, score, scale), scale)
            scores[str(index)] = None if math.isnan(directed) else directed
        principles.append({**_criterion_json(criterion), "scores": scores})
    return {"principles": principles}


def _principle_comparisons(
    objective: Objective, comparisons: Comparisons, indices: Sequence[int]
) -> Json:
    if objective.is_plain:
        return {}
    principles: list[Json] = []
    for criterion, part in zip(objective.criteria, comparisons.parts, strict=True):
        compared: list[Json] = []
        for pair in part.pairs:
            compared.append(_reading_json(part, pair, indices))
        principles.append({**_criterion_json(criterion), "comparisons": compared})
    return {"principles": principles}


def _reading_json(comparisons: Comparisons, pair: Pair, indices: Sequence[int]) -> Json:
    """Return one comparison by one criterion, before negation."""
    orders = [order_json(judgement.reading) for judgement in comparisons.orders[pair]]
    return {
        "pair": [indices[pair[0]], indices[pair[1]]],
        "relation": comparisons.relations.get(pair),
        "orders": orders,
    }


def order_json(reading: Reading | None) -> dict[str, float] | None:
    """Return the label probabilities of one order; A is the answer that is shown first."""
    return None if reading is None else dict(reading.probs)


def _criterion_json(criterion: Criterion) -> Json:
    fields: Json = {} if criterion.name is None else {"name": criterion.name}
    fields |= {"text": criterion.text, "weight": criterion.weight, "negate": criterion.negate}
    if criterion.hard:
        fields |= {"weight": None, "hard": True}
    return fields
