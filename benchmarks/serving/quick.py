"""Check whether serving has become slower: a quick set of ratios next to the recorded ones.

Each ratio has a baseline of the same run. The result is information, not a gate, since the speed of
a machine varies. A ratio has moved if every round of this run lies on the same side of the recorded
ratio and the median differs from it by more than a tenth.

    python benchmarks/serving/quick.py [ROUNDS]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.record import RESULTS, commit, machine
from benchmarks.serving import run, vas
from benchmarks.serving.rows import Row, ratio_row

ROUNDS = 3
# A median that differs by more than this share has moved.
TOLERANCE = 0.1
RECORDED_RESULTS = ("serving", "vas_speed")
OUT = Console(width=max(120, Console().width))


def steering(rounds: int) -> list[Row]:
    """Compare steering by the head with plain decoding: tokens per second at batch 16."""
    steered, plain = asyncio.run(_measure_steering(rounds))
    return [ratio_row("head, batch 16, against plain decoding", steered, plain, "")]


async def _measure_steering(rounds: int) -> tuple[float, float]:
    engine = await vas.start_engine()
    steered = []
    plain = []
    for _ in range(rounds):
        steered.append(await vas.rate(engine, vas.HEAD, 16, vas.TOP_K))
        plain.append(await vas.rate(engine, vas.PLAIN, 16, vas.TOP_K))
    await engine.close()
    return statistics.median(steered), statistics.median(plain)


BENCHMARKS: dict[str, Callable[[int], list[Row]]] = {
    "overhead": run.overhead,
    "best_of_n": run.best_of_n,
    "throughput": run.throughput,
    "steering": steering,
}


def recorded_ratios() -> dict[str, float]:
    """Return every recorded ratio by its name."""
    ratios = {}
    for name in RECORDED_RESULTS:
        result = json.loads((RESULTS / f"{name}.json").read_text())
        for row in result["rows"]:
            ratios[row["what"]] = ratio(row)
    return ratios


def ratio(row: Row) -> float:
    """Return our figure divided by the baseline; `value` may be a difference instead."""
    return float(row["ours"] / row["baseline"])


def verdict(ratios: Sequence[float], recorded: float) -> str:
    """Return the change of a ratio, and whether it has moved."""
    change = statistics.median(ratios) / recorded - 1
    one_sided = min(ratios) > recorded or max(ratios) < recorded
    moved = one_sided and abs(change) > TOLERANCE
    return f"{change:+.0%}" + (" moved" if moved else "")


def main() -> None:
    """Measure, compare and print. The exit code is always 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rounds", nargs="?", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    ratios: dict[str, list[float]] = {}
    for name, measure in BENCHMARKS.items():
        OUT.print(f"[dim]{name} ...[/]")
        for _ in range(rounds):
            for row in measure(1):
                ratios.setdefault(row["what"], []).append(ratio(row))
    recorded = recorded_ratios()
    table = Table(
        "ours / baseline",
        "now",
        "rounds",
        "recorded",
        "change",
        title=f"{commit()} on {machine()}",
        title_justify="left",
    )
    for what, values in ratios.items():
        table.add_row(
            what,
            f"{statistics.median(values):.3g}",
            f"{min(values):.3g} - {max(values):.3g}",
            f"{recorded[what]:.3g}",
            verdict(values, recorded[what]),
        )
    OUT.print(table)


if __name__ == "__main__":
    main()
