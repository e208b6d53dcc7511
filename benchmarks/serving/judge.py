"""What directions and a judge cost: RPS against best-of-n of equal budget, judging 8 candidates against generating them, calls.

Every figure stands beside a baseline of the same run, in alternating rounds; medians and ratios, as machines are noisy.
    python benchmarks/serving/judge.py [ROUNDS]
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from benchmarks.serving.client import Connection, serving
from infer_align.demo import world

DEMO = (
    "-m",
    "infer_align_server",
    "serve",
    "--set",
    "server.port={port}",
    "--set",
    "server.log_level=error",
)
ROUNDS = 40
DIRECTION = {
    "dpa": {"direction": {"helpfulness": 0.94, "verbosity": 0.34}},
    "rewards": {"preference": 1},
}
JUDGED = {"best_of_n": {"n": 8}, "rewards": {}}
FIXED = {
    "ignore_eos": True
}  # as many tokens either way: directions ask for answers of different length
WAYS: dict[str, dict[str, Any]] = {
    "rps": {**DIRECTION, "rps": {"k": 5}},
    "best of 5": {**DIRECTION, "best_of_n": {"n": 5}},
    "score": {**JUDGED, "trust_judge": {}},
    "pairwise": {**JUDGED, "trust_judge": {"mode": "pairwise"}},
}
OUT = Console()


async def measure(port: int, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Every way once a round, on another question and seed each time; the first two rounds warm up and are left out."""
    connection = Connection(port)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for i, question in enumerate(world.prompts(rounds + 2, seed=7)):
        for way, align in WAYS.items():
            body = {
                "model": "demo",
                "messages": [{"role": "user", "content": question}],
                "seed": i,
                "max_tokens": 64,
                "align": align,
                **(FIXED if "dpa" in align else {}),
            }
            started = perf_counter()
            answer = await connection.post("/v1/chat/completions", json.dumps(body).encode())
            found[way].append({**answer["align"], "seconds": perf_counter() - started})
    connection.close()
    return {way: reports[2:] for way, reports in found.items()}


def rows(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The figures that have an aim."""
    wall = {
        way: statistics.median(report["seconds"] for report in reports)
        for way, reports in found.items()
    }

    def timing(way: str, name: str) -> float:
        return statistics.median(report["timing"][name] for report in found[way])

    def calls(way: str) -> float:
        return max(report["usage"]["judge_calls"] for report in found[way])

    judging, comparing = timing("score", "score_seconds"), timing("pairwise", "score_seconds")
    generating = {way: timing(way, "generate_seconds") for way in ("score", "pairwise")}
    return [
        _row(
            "RPS with k = 5 against best of 5, wall time ratio",
            wall["rps"],
            wall["best of 5"],
            "at most 1.1",
        ),
        _row(
            "judging 8 candidates against generating them, ratio",
            judging,
            generating["score"],
            "at most 0.25",
        ),
        _row(
            "comparing 8 candidates in all pairs against generating them, ratio",
            comparing,
            generating["pairwise"],
            "",
        ),
        _row("judge calls for 8 candidates, per candidate", calls("score"), 8, "1"),
        _row("judge calls for 8 candidates in pairs, per pair", calls("pairwise"), 28, "2"),
    ]


def _row(what: str, ours: float, baseline: float, target: str) -> dict[str, Any]:
    return {
        "what": what,
        "value": ours / baseline,
        "ours": ours,
        "baseline": baseline,
        "target": target,
    }


def main(rounds: int) -> None:
    """Measure, print; record a full run."""
    with serving(*DEMO) as (port, _):
        figures = rows(asyncio.run(measure(port, rounds)))
    table = Table("what", "value", "ours", "baseline", "aim")
    for row in figures:
        table.add_row(
            row["what"],
            *(f"{row[key]:.4g}" for key in ("value", "ours", "baseline")),
            row["target"],
        )
    OUT.print(table)
    if rounds >= ROUNDS:
        baseline = (
            "best of 5 along the same direction; generating the 8 candidates of the same requests"
        )
        OUT.print(
            "written:",
            record(
                "judge_speed", baseline=baseline, seed=7, rows=figures, setup={"rounds": rounds}
            ),
            highlight=False,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS)
