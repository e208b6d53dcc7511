"""Measure the cost of directions and of a judge.

RPS is compared with best-of-n of equal budget, judging 8 candidates with generating them, and the
number of judge calls with that of candidates. Every figure has a baseline of the same run, in
alternating rounds; figures are medians and ratios, since machines are noisy.

    python benchmarks/serving/judge.py [ROUNDS]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from time import perf_counter
from typing import Any

from rich.console import Console

from benchmarks.record import record
from benchmarks.serving.answers import WrongAnswerError, check_completions
from benchmarks.serving.client import DEMO, Connection, serving
from benchmarks.serving.rows import Row, print_rows, ratio_row
from infer_align.demo import world

SERVER = (*DEMO, "--set", "server.log_level=error")
ROUNDS = 40
WARMUP_ROUNDS = 2
SEED = 7
DIRECTION = {
    "dpa": {"direction": {"helpfulness": 0.94, "verbosity": 0.34}},
    "rewards": {"preference": 1},
}
JUDGED = {"best_of_n": {"n": 8}, "rewards": {}}
# A direction changes the length of the answers: fix it, so that all settings do the same work.
FIXED_LENGTH = {"ignore_eos": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "rps": {**DIRECTION, "rps": {"k": 5}},
    "best of 5": {**DIRECTION, "best_of_n": {"n": 5}},
    "score": {**JUDGED, "trust_judge": {}},
    "pairwise": {**JUDGED, "trust_judge": {"mode": "pairwise"}},
}
# The `align` of each answer and its seconds, by setting.
Reports = dict[str, list[dict[str, Any]]]
OUT = Console()


async def measure(port: int, rounds: int) -> Reports:
    """Measure every setting once per round, with another question and seed in each round."""
    connection = Connection(port)
    reports: Reports = {name: [] for name in SETTINGS}
    for i, question in enumerate(world.prompts(rounds + WARMUP_ROUNDS, seed=SEED)):
        for name, align in SETTINGS.items():
            body = {
                "model": "demo",
                "messages": [{"role": "user", "content": question}],
                "seed": i,
                "max_tokens": 64,
                "align": align,
            }
            if "dpa" in align:
                body |= FIXED_LENGTH
            started = perf_counter()
            answer = await connection.post("/v1/chat/completions", json.dumps(body).encode())
            seconds = perf_counter() - started
            check_completions(body, [answer])
            _check_scores(answer["align"])
            reports[name].append({**answer["align"], "seconds": seconds})
    connection.close()
    return {name: items[WARMUP_ROUNDS:] for name, items in reports.items()}


def _check_scores(report: dict[str, Any]) -> None:
    """Check that every candidate was scored.

    Raises:
        WrongAnswerError: one was not.
    """
    for candidate in report["candidates"]:
        if candidate["objective"] is None:
            raise WrongAnswerError(f"a candidate was not scored: {candidate}")


def summarize(reports: Reports) -> list[Row]:
    """Return the figures that have a target."""

    def timing(name: str, key: str) -> float:
        return statistics.median(report["timing"][key] for report in reports[name])

    def wall_time(name: str) -> float:
        return statistics.median(report["seconds"] for report in reports[name])

    def judge_calls(name: str) -> float:
        return max(report["usage"]["judge_calls"] for report in reports[name])

    return [
        ratio_row(
            "RPS with k = 5 against best of 5, wall time ratio",
            wall_time("rps"),
            wall_time("best of 5"),
            "at most 1.1",
        ),
        ratio_row(
            "judging 8 candidates against generating them, ratio",
            timing("score", "score_seconds"),
            timing("score", "generate_seconds"),
            "at most 0.25",
        ),
        ratio_row(
            "comparing 8 candidates in all pairs against generating them, ratio",
            timing("pairwise", "score_seconds"),
            timing("pairwise", "generate_seconds"),
            "",
        ),
        ratio_row("judge calls for 8 candidates, per candidate", judge_calls("score"), 8, "1"),
        ratio_row(
            "judge calls for 8 candidates in pairs, per pair", judge_calls("pairwise"), 28, "2"
        ),
    ]


def main() -> None:
    """Measure and print; write the result of a full run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "rounds",
        nargs="?",
        type=int,
        default=ROUNDS,
        help="number of rounds; a result is written from %(default)s on",
    )
    rounds = parser.parse_args().rounds
    with serving(*SERVER) as (port, _):
        rows = summarize(asyncio.run(measure(port, rounds)))
    print_rows(rows, OUT)
    if rounds >= ROUNDS:
        path = record(
            "judge_speed",
            baseline="best of 5 along the same direction; "
            "generating the 8 candidates of the same requests",
            seed=SEED,
            rows=rows,
            setup={"rounds": rounds},
        )
        OUT.print("written:", path, highlight=False)


if __name__ == "__main__":
    main()
