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
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from benchmarks.serving.client import serving
from benchmarks.serving.run import DEMO
from infer_align_bench.cost import Setting, errors, fit, from_report, left_out, seconds
from infer_align_server import cli

OUT = Console(width=max(120, Console().width))
ROUNDS = 5
REQUESTS = 24
Case = tuple[int, int, int, int]  # requests under way, n, tokens of an answer, k
FITTED: list[Case] = [(1, 1, 16, 0), (1, 1, 64, 0), (8, 1, 48, 0), (24, 1, 32, 0), (1, 8, 32, 0), (4, 4, 16, 0), (4, 8, 64, 0)]
FITTED += [(12, 2, 48, 0), (1, 1, 48, 20), (8, 1, 32, 20), (8, 1, 48, 64), (4, 4, 32, 20)]
HELD_OUT: list[Case] = [(2, 1, 32, 0), (16, 1, 64, 0), (2, 8, 48, 0), (8, 4, 32, 0), (6, 2, 64, 0), (16, 1, 32, 20), (2, 8, 32, 20)]


def measure(url: str, case: Case, folder: Path) -> tuple[Setting, float]:
    """One closed loop; every candidate says exactly so many tokens."""
    concurrency, n, tokens, k = case
    align: dict[str, Any] = {"best_of_n": {"n": n}} if n > 1 else {}
    if k:
        align["vas"] = {"beta": {"helpful-lookahead": 2.0}, "top_k": k}
    path = folder / "result.json"
    arguments = ["--base-url", url, "--concurrency", str(concurrency), "--requests", str(max(REQUESTS, 3 * concurrency))]
    arguments += ["--warmup", str(concurrency), "--body", json.dumps({"max_tokens": tokens, "ignore_eos": True})]
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
                seen.setdefault(case, []).append(measure(f"http://127.0.0.1:{port}/v1", case, Path(folder)))
    return {case: (found[0][0], statistics.median(value for _, value in found)) for case, found in seen.items()}


def main(rounds: int) -> None:
    """Measure, fit, predict, record."""
    done = rounds_of(rounds)
    settings, measured = zip(*(done[case] for case in FITTED), strict=True)
    held, truth = zip(*(done[case] for case in HELD_OUT), strict=True)
    prices = fit(settings, measured)
    table = Table("under way", "n", "tokens", "k", "measured, ms", "predicted, ms", "error", "")
    rows = []
    for case, (setting, value) in done.items():
        predicted = seconds(prices, setting)
        row: dict[str, Any] = dict(zip(("concurrency", "n", "output_tokens", "k"), case, strict=True))
        row |= {"role": "held out" if case in HELD_OUT else "fitted", "measured_ms": value * 1e3, "predicted_ms": predicted * 1e3}
        row["error"] = predicted / value - 1
        rows.append(row)
        figures = f"{value * 1e3:.1f}", f"{predicted * 1e3:.1f}", f"{row['error']:+.0%}", row["role"]
        table.add_row(*(str(part) for part in case), *figures)
    OUT.print(table)
    unseen, others = np.abs(errors(prices, held, truth)), np.abs(left_out(settings, measured))
    summary = {"held_out_mean": unseen.mean(), "held_out_worst": unseen.max(), "left_out_mean": others.mean()}
    OUT.print({name: f"{value:.1%}" for name, value in summary.items()})
    setup = {"rounds": rounds, "requests": REQUESTS, "prices_seconds": asdict(prices)}
    setup["errors"] = {name: float(value) for name, value in summary.items()}
    OUT.print("written:", record("cost_model", baseline="the measured latency of each setting", seed=0, rows=rows, setup=setup))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS)
