"""Statistics, cells of tables and command-line arguments of all alignment benchmarks."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from infer_align.types import Array

OUT = Console(width=max(136, Console().width))


def argument_parser(description: str | None, prompts: int) -> argparse.ArgumentParser:
    """Return a parser for --prompts and --seed.

    Args:
        description: the docstring of the benchmark; its first line is the help text.
        prompts: default number of questions.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=prompts, help="number of questions")
    parser.add_argument("--seed", type=int, default=2024, help="seed of all draws")
    return parser


def mean_se(values: Array) -> tuple[float, float]:
    """Return the mean and the standard error of [P] values."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def figure(value: float, error: float) -> str:
    """Format a figure with its standard error."""
    return f"{value:.2f} ± {error:.2f}"


def row_figure(row: Mapping[str, Any], name: str) -> str:
    """Format the figure of a row with its standard error, or nothing if the row has none."""
    return figure(row[name], row[f"{name}_se"]) if name in row else ""


def difference(value: float, error: float, significance: float = 2.0) -> str:
    """Format a difference: bold if it is more than `significance` standard errors from zero."""
    style = "bold" if abs(value) > significance * error else "dim"
    return f"[{style}]{value:+.2f} ± {error:.2f}[/]"


def sign_of(value: float, error: float) -> int:
    """Return 1 or -1 if a difference is more than two standard errors from zero, else 0."""
    if abs(value) <= 2 * error:
        return 0
    return 1 if value > 0 else -1
