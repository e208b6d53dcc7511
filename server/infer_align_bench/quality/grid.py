"""The grid: named settings, from a TOML or JSON file.

baseline = "one sample"            # what every setting is compared with, prompt by prompt
greedy = "greedy"

[[cells]]
name = "one sample"

[[cells]]
name = "greedy"
body = { temperature = 0 }

[[cells]]
name = "best of {n}, {objective}"  # one cell for each combination of `over`
align = { best_of_n = { n = "{n}" }, ensemble = { objective = "{objective}" } }
over = { n = [2, 4, 8], objective = ["mean", "uwo"] }
equal_budget = true                # the family that others are compared with at the same tokens
"""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infer_align.errors import ConfigError, nearest, shown
from infer_align.methods.best_of_n import kl_upper_bound

KEYS = ("name", "align", "body", "over", "equal_budget")
BOUNDED = {
    "best_of_n",
    "ensemble",
    "rewards",
    "trust_judge",
    "budget",
    "details",
}  # of these, only best_of_n moves away
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting."""

    name: str
    align: Mapping[str, Any] | None = None
    body: Mapping[str, Any] = field(default_factory=dict)
    equal_budget: bool = False

    def kl_bound(self, shared: Iterable[str] = ()) -> float | None:
        """At most so many nats from the frozen model (ln n - (n - 1) / n); None where nothing is known without measuring.

        `shared`: the fields that every request carries besides; a temperature there moves this setting as its own would.
        """
        align = self.align or {}
        fields = {*shared} | {name for name, value in self.body.items() if value is not None}
        if not align.keys() <= BOUNDED or any(name in fields for name in SAMPLING):
            return None
        return kl_upper_bound(align["best_of_n"].get("n", 8)) if "best_of_n" in align else 0.0


@dataclass(frozen=True, slots=True)
class Grid:
    """All settings; the first is the baseline unless another is named."""

    cells: tuple[Cell, ...]
    baseline: str
    greedy: str | None = None


def read(path: Path) -> Grid:
    """The grid of a file.

    Raises:
        ConfigError: what is wrong, and where.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"--grid: {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"--grid: {path}: {error}.") from None
    if (
        not isinstance(table, dict)
        or not isinstance(table.get("cells"), list)
        or not table["cells"]
    ):
        raise ConfigError(f"--grid: {path} has no [[cells]].")
    for key in table:
        if key not in (known := ("baseline", "greedy", "cells")):
            raise ConfigError(f"--grid: {path}: {key}: no such key; {nearest(key, known)}")
    cells = tuple(
        cell
        for i, entry in enumerate(table["cells"])
        for cell in _cells(entry, f"{path}: cells[{i}]")
    )
    names = [cell.name for cell in cells]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"--grid: {path}: {doubled[0]!r} names two cells; with `over`, the name must hold its keys."
        )
    baseline, greedy = table.get("baseline", names[0]), table.get("greedy")
    for key, name in (("baseline", baseline), ("greedy", greedy)):
        if name is not None and name not in names:
            raise ConfigError(
                f"--grid: {path}: {key}: {shown(name)} is no cell; {nearest(str(name), names)}"
            )
    return Grid(cells, baseline, greedy)


def _cells(entry: Any, place: str) -> list[Cell]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise ConfigError(f"--grid: {place} needs a name.")
    for key in entry:
        if key not in KEYS:
            raise ConfigError(f"--grid: {place}.{key}: no such key; {nearest(key, KEYS)}")
    over = entry.get("over", {})
    if not isinstance(over, Mapping) or not all(
        isinstance(values, list) and values for values in over.values()
    ):
        raise ConfigError(f"--grid: {place}.over: must be {{name: [values]}}.")
    for key in ("align", "body"):
        if not isinstance(entry.get(key, {}), Mapping):
            raise ConfigError(
                f"--grid: {place}.{key}: {shown(entry[key])} is not allowed; must be a table."
            )
    return [
        Cell(
            str(_filled(entry["name"], dict(zip(over, values, strict=True)))),
            _filled(entry["align"], dict(zip(over, values, strict=True)))
            if "align" in entry
            else None,
            _filled(entry.get("body", {}), dict(zip(over, values, strict=True))),
            bool(entry.get("equal_budget", False)),
        )
        for values in itertools.product(*over.values())
    ]


def _filled(value: Any, chosen: Mapping[str, Any]) -> Any:
    """`value` with "{key}" replaced: by the value itself where it stands alone, by its text inside a longer string."""
    if isinstance(value, Mapping):
        return {key: _filled(item, chosen) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, chosen) for item in value]
    if not isinstance(value, str):
        return value
    if (alone := re.fullmatch(r"\{(\w+)\}", value)) and alone[1] in chosen:
        return chosen[alone[1]]
    return re.sub(r"\{(\w+)\}", lambda found: str(chosen.get(found[1], found[0])), value)
