"""Validate the cost model on the embedded demo.

Prices are fitted to some settings and predict others. Every setting is measured in each of several
rounds, so that a slow phase of the machine affects all of them; the median round counts.

    python benchmarks/serving/cost_model.py [ROUNDS]
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from benchmarks.serving.answers import check_target
from benchmarks.serving.client import DEMO, serving
from infer_align_bench.cost import (
    Prices,
    Setting,
    errors,
    fit,
    from_report,
    leave_one_out_errors,
    seconds,
)
from infer_align_server import cli

OUT = Console(width=max(120, Console().width))
ROUNDS = 5
# Requests of a setting, or three times its concurrency if that is more.
REQUESTS = 24
STEERING_BETA = {"helpful-lookahead": 2.0}


class Case(NamedTuple):
    """One kind of request under one load."""

    concurrency: int
    n: int
    # Words of the prompt; the endpoint counts its tokens.
    prompt_tokens: int
    output_tokens: int
    k: int = 0
    judged: bool = False


FITTED = [
    Case(1, 1, 16, 16),
    Case(1, 1, 16, 64),
    Case(8, 1, 48, 48),
    Case(24, 1, 16, 32),
    Case(1, 8, 48, 32),
    Case(4, 4, 16, 16),
    Case(4, 8, 16, 64),
    Case(12, 2, 96, 48),
    Case(1, 1, 96, 16),
    Case(16, 1, 96, 16),
    Case(1, 1, 16, 48, k=20),
    Case(8, 1, 48, 32, k=20),
    Case(8, 1, 16, 48, k=64),
    Case(4, 4, 16, 32, k=20),
    Case(1, 4, 16, 16, judged=True),
    Case(4, 4, 16, 32, judged=True),
    Case(2, 8, 48, 16, judged=True),
]
HELD_OUT = [
    Case(2, 1, 32, 32),
    Case(16, 1, 16, 64),
    Case(2, 8, 16, 48),
    Case(8, 4, 64, 32),
    Case(6, 2, 32, 64),
    Case(8, 1, 96, 32),
    Case(16, 1, 16, 32, k=20),
    Case(2, 8, 16, 32, k=20),
    Case(4, 8, 16, 16, judged=True),
    Case(2, 4, 48, 32, judged=True),
]
# Parts of a request whose prices the held-out settings may validate.
PARTS = ("prompt_tokens", "k", "reward_tokens", "judge_tokens")
# A measured setting, and its mean latency in seconds.
Measured = tuple[Setting, float]


def measure(url: str, case: Case, folder: Path) -> Measured:
    """Measure one closed loop, in which every candidate has exactly `output_tokens` tokens."""
    align = _align(case)
    path = folder / "result.json"
    arguments: dict[str, Any] = {
        "--base-url": url,
        "--concurrency": case.concurrency,
        "--requests": max(REQUESTS, 3 * case.concurrency),
        "--dataset": "synthetic",
        "--input-tokens": case.prompt_tokens,
        "--output-tokens": case.output_tokens,
        "--warmup": case.concurrency,
        "--body": json.dumps({"ignore_eos": True}),
        "--json": path,
    }
    if align:
        arguments["--align"] = json.dumps(align)
    flags = []
    for name, value in arguments.items():
        flags += [name, str(value)]
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        code = cli.main(["bench", "serve", *flags])
    if code:
        raise SystemExit(f"{case} could not be measured:\n{output.getvalue()}")
    report = json.loads(path.read_text())
    for target in report["targets"].values():
        check_target(target, case.output_tokens)
    return from_report(report, path.name)


def _align(case: Case) -> dict[str, Any]:
    align: dict[str, Any] = {}
    if case.n > 1:
        align["best_of_n"] = {"n": case.n}
    if case.k:
        align["vas"] = {"beta": STEERING_BETA, "top_k": case.k}
    if case.judged:
        align |= {"trust_judge": {}, "rewards": {}}
    return align


def measure_rounds(rounds: int) -> dict[Case, Measured]:
    """Measure every case in each round; return its setting and its median latency."""
    measurements: dict[Case, list[Measured]] = {}
    with serving(*DEMO) as (port, _), tempfile.TemporaryDirectory() as folder:
        url = f"http://127.0.0.1:{port}/v1"
        for i in range(rounds):
            OUT.print(f"[dim]round {i + 1} of {rounds}[/]")
            for case in [*FITTED, *HELD_OUT]:
                measurement = measure(url, case, Path(folder))
                measurements.setdefault(case, []).append(measurement)
    medians = {}
    for case, values in measurements.items():
        setting, _ = values[0]
        medians[case] = (setting, statistics.median(latency for _, latency in values))
    return medians


def make_row(case: Case, setting: Setting, latency: float, prices: Prices) -> dict[str, Any]:
    """Return the row of one case: its setting, its latency and the prediction."""
    predicted = seconds(prices, setting)
    return {
        **case._asdict(),
        "prompt_tokens": setting.prompt_tokens,
        "judge_tokens": setting.judge_tokens,
        "role": "held out" if case in HELD_OUT else "fitted",
        "measured_ms": latency * 1e3,
        "predicted_ms": predicted * 1e3,
        "error": predicted / latency - 1,
    }


def print_settings(rows: list[dict[str, Any]]) -> None:
    """Print measured and predicted latency of every case."""
    table = Table(
        "in flight",
        "n",
        "prompt",
        "tokens",
        "k",
        "judge",
        "measured, ms",
        "predicted, ms",
        "error",
        "",
    )
    for row in rows:
        table.add_row(
            str(row["concurrency"]),
            str(row["n"]),
            f"{row['prompt_tokens']:.0f}",
            str(row["output_tokens"]),
            str(row["k"]),
            f"{row['judge_tokens']:.0f}",
            f"{row['measured_ms']:.1f}",
            f"{row['predicted_ms']:.1f}",
            f"{row['error']:+.0%}",
            row["role"],
        )
    OUT.print(table)


def summarize_errors(measured: Mapping[Case, Measured], prices: Prices) -> dict[str, float]:
    """Return the errors of held-out settings, and of fitted ones that are left out in turn."""
    settings, latencies = zip(*(measured[case] for case in FITTED), strict=True)
    held_out, held_out_latencies = zip(*(measured[case] for case in HELD_OUT), strict=True)
    held_out_errors = np.abs(errors(prices, held_out, held_out_latencies))
    left_out_errors = np.abs(leave_one_out_errors(settings, latencies))
    return {
        "held_out_mean": float(held_out_errors.mean()),
        "held_out_worst": float(held_out_errors.max()),
        "left_out_mean": float(left_out_errors.mean()),
    }


def main() -> None:
    """Measure, fit, predict and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rounds", nargs="?", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    measured = measure_rounds(rounds)
    settings, latencies = zip(*(measured[case] for case in FITTED), strict=True)
    prices = fit(settings, latencies)
    rows = []
    for case, (setting, latency) in measured.items():
        rows.append(make_row(case, setting, latency, prices))
    print_settings(rows)
    summary = summarize_errors(measured, prices)
    OUT.print({name: f"{value:.1%}" for name, value in summary.items()})
    validated = {}
    for part in PARTS:
        validated[part] = any(getattr(measured[case][0], part) for case in HELD_OUT)
    path = record(
        "cost_model",
        baseline="the measured latency of each setting",
        seed=0,
        rows=rows,
        setup={
            "rounds": rounds,
            "requests": REQUESTS,
            "prices_seconds": asdict(prices),
            "validated": validated,
            "errors": summary,
        },
    )
    OUT.print("written:", path)


if __name__ == "__main__":
    main()
