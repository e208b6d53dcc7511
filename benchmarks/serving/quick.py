"""Has anything become slower? A quick fixed set of ratios, each against its baseline in this run, beside what is recorded.

Information, not a gate: a machine has moods. A ratio is said to have moved when every round of this run lies on the same side of
the recorded one, and the median differs from it by more than a tenth.
    python benchmarks/serving/quick.py [ROUNDS]
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.record import RESULTS, commit, machine
from benchmarks.serving import run, vas
from infer_align import config
from infer_align.engines.transformers import TransformersEngine

ROUNDS = 3
MOVED = 0.1
OUT = Console(width=max(120, Console().width))


def steering(rounds: int) -> list[dict[str, Any]]:
    """Tokens per second of the head, batch 16, against plain decoding."""

    async def measure() -> tuple[float, float]:
        engine = config.load(None, ["engine.threads=1"]).load_engine()
        assert isinstance(engine, TransformersEngine)
        await engine.start()
        rates = [
            (await vas.rate(engine, vas.HEAD, 16, 20), await vas.rate(engine, vas.PLAIN, 16, 20))
            for _ in range(rounds)
        ]
        await engine.close()
        ours, plain = zip(*rates, strict=True)
        return statistics.median(ours), statistics.median(plain)

    ours, plain = asyncio.run(measure())
    return [run.row("head, batch 16, against plain decoding", ours / plain, ours, plain, "")]


QUICK: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "overhead": run.overhead,
    "best_of_n": run.best_of_n,
    "throughput": run.throughput,
    "steering": steering,
}


def recorded() -> dict[str, float]:
    """Every ratio that is recorded."""
    files = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("serving", "vas_speed")
    )
    return {row["what"]: ratio(row) for result in files for row in result["rows"]}


def ratio(row: dict[str, Any]) -> float:
    """What is compared: ours over the baseline, whatever unit the row itself speaks in."""
    return float(row["ours"] / row["baseline"])


def verdict(values: Iterable[float], before: float) -> str:
    """Whether a ratio has moved, by how much."""
    values = list(values)
    change = statistics.median(values) / before - 1
    one_sided = all(value > before for value in values) or all(value < before for value in values)
    return f"{change:+.0%}" + (" moved" if one_sided and abs(change) > MOVED else "")


def main(rounds: int) -> None:
    """Measure, compare, print; always ends well."""
    found: dict[str, list[float]] = {}
    for name, measure in QUICK.items():
        OUT.print(f"[dim]{name} ...[/]")
        for _ in range(rounds):
            for row in measure(1):
                found.setdefault(row["what"], []).append(ratio(row))
    before = recorded()
    table = Table(
        "ours / baseline",
        "now",
        "rounds",
        "recorded",
        "change",
        title=f"{commit()} on {machine()}",
        title_justify="left",
    )
    for what, values in found.items():
        spread = f"{min(values):.3g} - {max(values):.3g}"
        table.add_row(
            what,
            f"{statistics.median(values):.3g}",
            spread,
            f"{before[what]:.3g}",
            verdict(values, before[what]),
        )
    OUT.print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS)
