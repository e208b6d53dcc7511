"""The figures of a report for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from infer_align_bench.quality.advice import Advice
from infer_align_bench.quality.curve import Cost, Mean, Point


def as_json(found: Sequence[Point], advised: Mapping[Cost, Sequence[Advice]]) -> dict[str, Any]:
    """Points and advice for a file; a mean is {value, error}, null where there is none."""
    means = ("gold", "minus_baseline", "minus_greedy", "minus_equal", "generated")
    settings = [
        {
            "name": point.cell.name,
            "align": point.cell.align,
            "body": dict(point.cell.body),
            "prompts": point.prompts,
            "missing": point.missing,
            "tokens": _finite(point.cost("tokens")),
            "seconds": point.seconds.value,
            "tokens_error": point.tokens and _finite(point.tokens.error),
            "seconds_error": _finite(point.seconds.error),
            "kl_bound": point.kl_bound,
            "fronts": sorted(point.fronts),
            **{name: _mean_json(getattr(point, name)) for name in means},
        }
        for point in found
    ]
    given = {
        cost: [
            {
                "from": one.cost,
                "use": one.name,
                "chance": one.chance,
                "held_out": _finite(one.held_out),
                "cheaper": one.cheaper
                and {"use": one.cheaper.name, "loss": _mean_json(one.cheaper.loss)},
            }
            for one in choices
        ]
        for cost, choices in advised.items()
    }
    return {"settings": settings, "advice": given}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean_json(mean: Mean | None) -> dict[str, float | None] | None:
    return None if mean is None else {"value": mean.value, "error": _finite(mean.error)}
