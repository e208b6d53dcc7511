"""The grid of settings to compare, from a TOML or JSON file.

baseline = "one sample"            # every setting is compared with it, prompt by prompt
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
equal_budget = true                # others are compared with this family at equal tokens
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infer_align.config.toml_text import parse_toml
from infer_align.errors import ConfigError, nearest, quote
from infer_align.methods.best_of_n import BestOfN, kl_upper_bound

GRID_KEYS = ("baseline", "greedy", "cells")
CELL_KEYS = ("name", "align", "body", "over", "equal_budget")
# Keys of `align` with a known KL bound: only best_of_n changes the distribution of the answers.
BOUNDED_KEYS = {"best_of_n", "ensemble", "rewards", "trust_judge", "budget", "details"}
# Keys of `align` that steer every token.
STEERING_KEYS = {"vas", "guidance"}
# Keys of `align` that leave a steered answer a sample of its policy.
NEUTRAL_KEYS = {"ensemble", "rewards", "budget", "details"}
# Body fields that change the distribution of the answers, by an unknown amount.
SAMPLING_FIELDS = {
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting: an `align` object and further body fields."""

    name: str
    align: Mapping[str, Any] | None = None
    body: Mapping[str, Any] = field(default_factory=dict)
    equal_budget: bool = False

    def kl_bound(self, shared: Iterable[str] = ()) -> float | None:
        """Return an upper bound of the KL divergence from the frozen model, in nats.

        It is ln n - (n - 1) / n for best-of-n; None if no bound is known.

        Args:
            shared: body fields that every request of the measurement has.
        """
        align = self.align or {}
        fields = set(shared)
        for name, value in self.body.items():
            if value is not None:
                fields.add(name)
        if not align.keys() <= BOUNDED_KEYS or fields & SAMPLING_FIELDS:
            return None
        if "best_of_n" not in align:
            return 0.0
        return kl_upper_bound(align["best_of_n"].get("n", BestOfN().n))

    @property
    def is_steered(self) -> bool:
        """Return True if the answer is one draw of a steered policy, whose KL can be estimated."""
        keys = set(self.align or {})
        return bool(keys & STEERING_KEYS) and keys <= STEERING_KEYS | NEUTRAL_KEYS


@dataclass(frozen=True, slots=True)
class Grid:
    """All settings. The first is the baseline unless the file names another."""

    cells: tuple[Cell, ...]
    baseline: str
    greedy: str | None = None


def read_grid(path: Path) -> Grid:
    """Read the grid of a TOML or JSON file.

    Raises:
        ConfigError: the file cannot be read, or a value in it is wrong.
    """
    table = _read_table(path)
    for key in table:
        if key not in GRID_KEYS:
            raise ConfigError(f"--grid: {path}: {key}: no such key; {nearest(key, GRID_KEYS)}")
    cells: list[Cell] = []
    for i, entry in enumerate(table["cells"]):
        cells += _cells(entry, f"{path}: cells[{i}]")
    names = [cell.name for cell in cells]
    for name in sorted(names):
        if names.count(name) > 1:
            raise ConfigError(
                f"--grid: {path}: {name!r} names two cells; must be unique. "
                "With `over`, the name must contain its keys, such as {n}."
            )
    baseline = table.get("baseline", names[0])
    greedy = table.get("greedy")
    for key, reference in (("baseline", baseline), ("greedy", greedy)):
        if reference is not None and reference not in names:
            guess = nearest(str(reference), names)
            raise ConfigError(f"--grid: {path}: {key}: {quote(reference)} is not a cell; {guess}")
    return Grid(tuple(cells), baseline, greedy)


def _read_table(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        table = json.loads(text) if path.suffix == ".json" else parse_toml(text)
    except OSError as error:
        raise ConfigError(f"--grid: {path} cannot be read: {error.strerror}.") from None
    except RecursionError:
        raise ConfigError(f"--grid: {path}: it is nested too deeply.") from None
    except ValueError as error:
        raise ConfigError(f"--grid: {path}: {error}.") from None
    cells = table.get("cells") if isinstance(table, dict) else None
    if not isinstance(cells, list) or not cells:
        raise ConfigError(f"--grid: {path} has no [[cells]]; add one for each setting.")
    return table


def _cells(entry: Any, place: str) -> list[Cell]:
    """Return the cells of one entry: one for each combination of `over`."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise ConfigError(f"--grid: {place} needs a name.")
    for key in entry:
        if key not in CELL_KEYS:
            raise ConfigError(f"--grid: {place}.{key}: no such key; {nearest(key, CELL_KEYS)}")
    over = entry.get("over", {})
    if not isinstance(over, Mapping) or not all(map(_is_filled_list, over.values())):
        raise ConfigError(
            f"--grid: {place}.over: {quote(over)} is not allowed; must be {{name: [values]}}."
        )
    for key in ("align", "body"):
        if not isinstance(entry.get(key, {}), Mapping):
            raise ConfigError(
                f"--grid: {place}.{key}: {quote(entry[key])} is not allowed; must be a table."
            )
    return [_cell(entry, over, values) for values in itertools.product(*over.values())]


def _is_filled_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _cell(entry: Mapping[str, Any], over: Mapping[str, Any], values: Sequence[Any]) -> Cell:
    """Return the cell of one combination of values."""
    combination = dict(zip(over, values, strict=True))
    return Cell(
        name=str(_substitute(entry["name"], combination)),
        align=_substitute(entry["align"], combination) if "align" in entry else None,
        body=_substitute(entry.get("body", {}), combination),
        equal_budget=bool(entry.get("equal_budget", False)),
    )


def _substitute(value: Any, combination: Mapping[str, Any]) -> Any:
    """Replace "{key}" in all strings of a JSON value.

    A string that is only "{key}" becomes the value itself; within a longer string, "{key}" becomes
    the text of the value.
    """
    if isinstance(value, Mapping):
        return {key: _substitute(item, combination) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(item, combination) for item in value]
    if not isinstance(value, str):
        return value
    single = re.fullmatch(r"\{(\w+)\}", value)
    if single and single[1] in combination:
        return combination[single[1]]
    return re.sub(r"\{(\w+)\}", lambda match: str(combination.get(match[1], match[0])), value)
