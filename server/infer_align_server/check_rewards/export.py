"""Write the figures of a check as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from infer_align.diagnostics.overoptimisation import GoldCurve
from infer_align_server.check_rewards.page import CheckedRewards
from infer_align_server.check_rewards.verdicts import judge_reward


def as_json(checked: CheckedRewards) -> dict[str, Any]:
    """Return everything that was measured as JSON. A figure that is NaN or infinite is null."""
    rewards = []
    for report in checked.reports:
        verdict = judge_reward(report)
        rewards.append({**_value(report), "verdict": _value(verdict)})
    return {
        "rewards": rewards,
        "facts": dict(checked.facts),
        "problems": list(checked.problems),
        "omitted": dict(checked.omitted),
    }


def _value(value: object) -> Any:
    if isinstance(value, GoldCurve):
        return {"n": list(value.n), "kl": list(value.kl), "gold": _value(value.means)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        return _value(fields)
    if isinstance(value, Mapping):
        return {str(name): _value(each) for name, each in value.items()}
    if isinstance(value, np.ndarray):
        return _value(value.tolist())
    if isinstance(value, list | tuple):
        return [_value(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
