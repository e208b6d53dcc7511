"""Write a recorded result of benchmarks/results as a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"

Row = dict[str, Any]
Cell = Callable[[Row], str]
Columns = list[tuple[str, Cell]]


# --- cells ---


def text(key: str) -> Cell:
    """Return a cell with the value of `key` as it stands."""
    return lambda row: str(row[key])


def number(key: str, digits: int = 2) -> Cell:
    """Return a cell with a fixed number of digits, or an empty one without a value."""

    def cell(row: Row) -> str:
        value = row.get(key)
        return "" if value is None else f"{value:.{digits}f}"

    return cell


def with_error(key: str, digits: int = 2, sign: str = "") -> Cell:
    """Return a cell "value ± standard error", where the error stands in `{key}_se`."""

    def cell(row: Row) -> str:
        if key not in row:
            return ""
        error = row[f"{key}_se"]
        return f"{row[key]:{sign}.{digits}f} ± {error:.{digits}f}"

    return cell


def estimate(key: str) -> Cell:
    """Return a cell "value ± error" of a `{value, error}` object, or an empty one without it."""

    def cell(row: Row) -> str:
        mean = row[key]
        return "" if mean is None else f"{mean['value']:.2f} ± {mean['error']:.2f}"

    return cell


def yes(key: str) -> Cell:
    """Return a cell that says "yes" where `key` is true."""
    return lambda row: "yes" if row[key] else ""


# --- tables ---


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head)]
    for row in rows:
        lines.append([cell.replace("|", "\\|") for cell in row])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def recorded(name: str) -> dict[str, Any] | None:
    """Return a recorded result, or None if there is none yet."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def result_table(
    name: str, columns: Columns, include: Callable[[Row], bool] = lambda row: True
) -> str:
    """Return the rows of a recorded result that `include` accepts."""
    result = recorded(name)
    if result is None:
        return f"Not recorded yet: benchmarks/results/{name}.json.\n"
    rows = []
    for row in result["rows"]:
        if include(row):
            rows.append([cell(row) for _, cell in columns])
    return table([title for title, _ in columns], rows)
