"""Convert the figures of a quality report to JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from infer_align_bench.quality.advice import Advice
from infer_align_bench.quality.curve import Cost, Mean, Point


def as_json(points: Sequence[Point], advice: Mapping[Cost, Sequence[Advice]]) -> dict[str, Any]:
    """Return points and advice for a file. A mean is {value, error}; null where there is none."""
    advice_json = {}
    for cost, choices in advice.items():
        advice_json[cost] = [_advice_json(choice) for choice in choices]
    return {"settings": [_point_json(point) for point in points], "advice": advice_json}


def _point_json(point: Point) -> dict[str, Any]:
    return {
        "name": point.cell.name,
        "align": point.cell.align,
        "body": dict(point.cell.body),
        "prompts": point.prompts,
        "missing": point.missing,
        "tokens": _finite(point.cost("tokens")),
        "seconds": point.seconds.value,
        "tokens_error": _finite(point.tokens.error) if point.tokens else None,
        "seconds_error": _finite(point.seconds.error),
        "kl_bound": point.kl_bound,
        "kl": _mean_json(point.kl),
        "fronts": sorted(point.fronts),
        "gold": _mean_json(point.gold),
        "minus_baseline": _mean_json(point.minus_baseline),
        "minus_greedy": _mean_json(point.minus_greedy),
        "minus_equal": _mean_json(point.minus_equal),
        "generated": _mean_json(point.generated),
    }


def _advice_json(choice: Advice) -> dict[str, Any]:
    cheaper = None
    if choice.cheaper:
        cheaper = {"use": choice.cheaper.name, "loss": _mean_json(choice.cheaper.loss)}
    return {
        "from": choice.cost,
        "use": choice.name,
        "chance": choice.chance,
        "held_out": _finite(choice.held_out),
        "cheaper": cheaper,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean_json(mean: Mean | None) -> dict[str, float | None] | None:
    return None if mean is None else {"value": mean.value, "error": _finite(mean.error)}
