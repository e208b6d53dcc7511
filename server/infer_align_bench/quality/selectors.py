"""The rewards by which a setting selects or steers, and whether one of them is also the gold.

A setting that maximizes the gold itself gets high gold whatever its answers are like. Such a
measurement says how well the reward is maximized, not whether answers are better.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from infer_align_bench.endpoint import Endpoint
from infer_align_bench.quality.grid import Cell

# Keys of `align` that draw several candidates, of which rewards select one.
SELECTING_KEYS = {"best_of_n", "rps", "adaptive"}
JUDGE = "trust_judge"


@dataclass(frozen=True, slots=True)
class ServerNames:
    """The rewards and values of a server, as far as the selection depends on them.

    Attributes:
        default_rewards: names of the rewards of requests that name none.
        value_rewards: value -> reward that it was fitted to.
    """

    default_rewards: tuple[str, ...] = ()
    value_rewards: Mapping[str, str] = field(default_factory=dict)


async def read_names(endpoint: Endpoint) -> ServerNames:
    """Ask a server for its default rewards and the rewards of its values.

    A server that does not know /v1/align/methods has none.
    """
    status, body = await endpoint.call("align/methods")
    if status != 200 or not isinstance(body, Mapping):
        return ServerNames()
    defaults = []
    for name, reward in _entries(body, "rewards"):
        if reward.get("default_weight"):
            defaults.append(name)
    fitted = {}
    for name, value in _entries(body, "values"):
        summary = value.get("summary")
        if isinstance(summary, Mapping) and isinstance(summary.get("reward"), str):
            fitted[name] = summary["reward"]
    return ServerNames(tuple(defaults), fitted)


def _entries(body: Mapping[str, Any], key: str) -> list[tuple[str, Mapping[str, Any]]]:
    section = body.get(key)
    if not isinstance(section, Mapping):
        return []
    return [(name, entry) for name, entry in section.items() if isinstance(entry, Mapping)]


def selected_by_gold(cells: Sequence[Cell], gold: str, names: ServerNames) -> dict[str, list[str]]:
    """Return the settings that the gold itself selects or steers.

    Args:
        cells: the settings.
        gold: the scorer, as the command names it; a function has no name on the server.
        names: of the measured server.

    Returns:
        For each such setting, the rewards that are also the gold.
    """
    judged_by = set(_gold_names(gold))
    result = {}
    for cell in cells:
        common = judged_by & set(_selectors(cell, names))
        if common:
            result[cell.name] = sorted(common)
    return result


def _gold_names(gold: str) -> Iterable[str]:
    if not gold.startswith("{"):
        return () if ":" in gold else (gold,)
    settings = json.loads(gold)
    rewards = _weighted(settings.get("rewards"), ())
    return [*rewards, JUDGE] if JUDGE in settings else rewards


def _selectors(cell: Cell, names: ServerNames) -> list[str]:
    """Return the rewards that decide about the answer of a setting."""
    align = cell.align or {}
    result = []
    if align.keys() & SELECTING_KEYS:
        result += _weighted(align.get("rewards"), names.default_rewards)
        if JUDGE in align:
            result.append(JUDGE)
    for key, weights in (("vas", "beta"), ("early_stop", "values")):
        section = align.get(key)
        values = section.get(weights) if isinstance(section, Mapping) else None
        for value in _weighted(values, ()):
            if value in names.value_rewards:
                result.append(names.value_rewards[value])
    return result


def _weighted(weights: Any, default: Sequence[str]) -> list[str]:
    """Return the names whose weight is not 0; the default if there are no weights."""
    if not isinstance(weights, Mapping):
        return list(default)
    return [name for name, weight in weights.items() if weight]


def describe_gold_selection(selected: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the warning about settings that gold selects; nothing if there are none."""
    if not selected:
        return []
    rewards = sorted(set(itertools.chain.from_iterable(selected.values())))
    return [
        f"The gold also selects. {', '.join(map(repr, rewards))} scores the answers, and selects "
        f"or steers them in: {', '.join(selected)}. Their gold is high by construction and does "
        "not show that the answers are better. Score with another reward."
    ]
