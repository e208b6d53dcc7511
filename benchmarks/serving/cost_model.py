"""The cost model against the embedded demo: prices from some settings, the error on others that it has not seen.

Every setting is measured in each of several rounds, so that a slow minute falls on all of them; the median round counts.
python benchmarks/serving/cost_model.py [ROUNDS]
"""

from __future__ import annotations

import io
import json
import statistics
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from benchmarks.serving.client import serving
from benchmarks.serving.run import DEMO
from infer_align_bench.cost import Setting, errors, fit, from_report, leave_one_out_errors, seconds
from infer_align_server import cli

OUT = Console(width=max(120, Console().width))
ROUNDS = 5
REQUESTS = 24


class Case(NamedTuple):
    """One kind of request under one load."""

    concurrency: int
    n: int
    prompt_tokens: int  # words that are asked; the endpoint says how many tokens they are
    output_tokens: int
    k: int = 0
    judged: bool = False


FITTED = [
    Case(*case)
    for case in [
        (1, 1, 16, 16),
        (1, 1, 16, 64),
        (8, 1, 48, 48),
        (24, 1, 16, 32),
        (1, 8, 48, 32),
        (4, 4, 16, 16),
        (4, 8, 16, 64),
        (12, 2, 96, 48),
        (1, 1, 96, 16),
        (16, 1, 96, 16),
        (1, 1, 16, 48, 20),
        (8, 1, 48, 32, 20),
        (8, 1, 16, 48, 64),
        (4, 4, 16, 32, 20),
        (1, 4, 16, 16, 0, True),
        (4, 4, 16, 32, 0, True),
        (2, 8, 48, 16, 0, True),
    ]
]
HELD_OUT = [
    Case(*case)
    for case in [
        (2, 1, 32, 32),
        (16, 1, 16, 64),
        (2, 8, 16, 48),
        (8, 4, 64, 32),
        (6, 2, 32, 64),
        (8, 1, 96, 32),
        (16, 1, 16, 32, 20),
        (2, 8, 16, 32, 20),
        (4, 8, 16, 16, 0, True),
        (2, 4, 48, 32, 0, True),
    ]
]


def measure(url: str, case: Case, folder: Path) -> tuple[Setting, float]:
    """One closed loop; every candidate says exactly so many tokens."""
    align: dict[str, Any] = {"best_of_n": {"n": case.n}} if case.n > 1 else {}
    if case.k:
        align["vas"] = {"beta": {"helpful-lookahead": 2.0}, "top_k": case.k}
    if case.judged:
        align |= {"trust_judge": {}, "rewards": {}}
    path = folder / "result.json"
    arguments = [
        "--base-url",
        url,
        "--concurrency",
        str(case.concurrency),
        "--requests",
        str(max(REQUESTS, 3 * case.concurrency)),
    ]
    arguments += [
        "--dataset",
        "synthetic",
        "--input-tokens",
        str(case.prompt_tokens),
        "--output-tokens",
        str(case.output_tokens),
    ]
    arguments += ["--warmup", str(case.concurrency), "--body", json.dumps({"ignore_eos": True})]
    arguments += ["--align", json.dumps(align)] if align else []
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = cli.main(["bench", "serve", *arguments, "--json", str(path)])
    if code:
        raise SystemExit(f"{case} could not be measured:\n{said.getvalue()}")
    return from_report(json.loads(path.read_text()), path.name)


def rounds_of(rounds: int) -> dict[Case, tuple[Setting, float]]:
    """Each setting, and its median latency over the rounds."""
    seen: dict[Case, list[tuple[Setting, float]]] = {}
    with serving(*DEMO) as (port, _), tempfile.TemporaryDirectory() as folder:
        for i in range(rounds):
            OUT.print(f"[dim]round {i + 1} of {rounds}[/]")
            for case in [*FITTED, *HELD_OUT]:
                seen.setdefault(case, []).append(
                    measure(f"http://127.0.0.1:{port}/v1", case, Path(folder))
                )
    return {
        case: (found[0][0], statistics.median(value for _, value in found))
        for case, found in seen.items()
    }


def main(rounds: int) -> None:
    """Measure, fit, predict, record."""
    done = rounds_of(rounds)
    settings, measured = zip(*(done[case] for case in FITTED), strict=True)
    held, truth = zip(*(done[case] for case in HELD_OUT), strict=True)
    prices = fit(settings, measured)
    table = Table(
        "under way",
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
    rows = []
    for case, (setting, value) in done.items():
        predicted = seconds(prices, setting)
        row: dict[str, Any] = case._asdict() | {
            "prompt_tokens": setting.prompt_tokens,
            "judge_tokens": setting.judge_tokens,
        }
        row |= {
            "role": "held out" if case in HELD_OUT else "fitted",
            "measured_ms": value * 1e3,
            "predicted_ms": predicted * 1e3,
        }
        row["error"] = predicted / value - 1
        rows.append(row)
        figures = (
            f"{value * 1e3:.1f}",
            f"{predicted * 1e3:.1f}",
            f"{row['error']:+.0%}",
            row["role"],
        )
        parts = (
            case.concurrency,
            case.n,
            f"{setting.prompt_tokens:.0f}",
            case.output_tokens,
            case.k,
            f"{setting.judge_tokens:.0f}",
        )
        table.add_row(*(str(part) for part in parts), *figures)
    OUT.print(table)
    unseen, others = (
        np.abs(errors(prices, held, truth)),
        np.abs(leave_one_out_errors(settings, measured)),
    )
    summary = {
        "held_out_mean": unseen.mean(),
        "held_out_worst": unseen.max(),
        "left_out_mean": others.mean(),
    }
    OUT.print({name: f"{value:.1%}" for name, value in summary.items()})
    setup = {"rounds": rounds, "requests": REQUESTS, "prices_seconds": asdict(prices)}
    parts = ("prompt_tokens", "k", "reward_tokens", "judge_tokens")
    setup["validated"] = {name: any(getattr(setting, name) for setting in held) for name in parts}
    setup["errors"] = {name: float(value) for name, value in summary.items()}
    OUT.print(
        "written:",
        record(
            "cost_model",
            baseline="the measured latency of each setting",
            seed=0,
            rows=rows,
            setup=setup,
        ),
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS)
