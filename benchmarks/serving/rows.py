"""The rows of a result: one figure each, with its baseline and its target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def row(what: str, value: float, ours: float, baseline: float, target: str) -> Row:
    """Return one figure, the two measurements that it compares, and its target."""
    return {"what": what, "value": value, "ours": ours, "baseline": baseline, "target": target}


def ratio_row(what: str, ours: float, baseline: float, target: str) -> Row:
    """Return the row of the ratio of two measurements."""
    return row(what, ours / baseline, ours, baseline, target)


def print_rows(
    rows: Sequence[Row],
    console: Console,
    columns: Sequence[str] = ("what", "value", "ours", "baseline", "target"),
) -> None:
    """Print the rows as a table."""
    table = Table(*columns)
    for item in rows:
        numbers = [f"{item[key]:.4g}" for key in ("value", "ours", "baseline")]
        table.add_row(item["what"], *numbers, item["target"])
    console.print(table)
