"""Which tokens should a value head steer? Top-k, all tokens, or the likely ones, at equal KL.

A head values all tokens with one product, so the published limit of k candidates is a choice. This
compares the choices on the embedded demo by gold reward against the distance from the frozen model.

    python benchmarks/alignment/vas_forms.py
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.alignment.flow import Flow, gold, serving, texts
from benchmarks.alignment.report import OUT, argument_parser, figure, mean_se
from benchmarks.record import record
from infer_align.demo import world
from infer_align.flow.response import Response
from infer_align.types import Array

FORMS: dict[str, dict[str, Any]] = {
    "top_k 20": {"top_k": 20},
    "top_k 20, mask": {"top_k": 20, "tail": "mask"},
    "all": {"top_k": "all"},
    "min_p 0.02": {"min_p": 0.02},
    "min_p 0.1": {"min_p": 0.1},
    "min_p 0.02, mask": {"min_p": 0.02, "tail": "mask"},
    "min_p 0.1, mask": {"min_p": 0.1, "tail": "mask"},
}
BETAS = (2.0, 4.0, 8.0, 16.0, 32.0)
DRAWS = 4
# Gold is read off the curve of each form at these distances, in nats per answer.
LEVELS = (2.0, 5.0, 10.0)


async def measure(flow: Flow, questions: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Return one row per form and beta, and those of the frozen model."""
    rows = [
        _row("frozen", 0.0, questions, await flow.ask_all(questions, seed, n=DRAWS)),
        _row("greedy", 0.0, questions, await flow.ask_all(questions, seed, temperature=0)),
    ]
    for form, parameters in FORMS.items():
        for beta in BETAS:
            vas = {"vas": {"beta": {"helpful": beta}, **parameters}}
            responses = await flow.ask_all(questions, seed, vas, n=DRAWS, logprobs=True)
            rows.append(_row(form, beta, questions, responses))
    return rows


def _row(
    form: str, beta: float, questions: Sequence[str], responses: Sequence[Response]
) -> dict[str, Any]:
    draws = list(zip(*texts(responses), strict=True))
    worth = np.stack([gold(questions, draw) for draw in draws]).mean(0)
    row: dict[str, Any] = {"form": form, "beta": beta}
    row["gold"], row["gold_se"] = mean_se(worth)
    row["kl"], row["kl_se"] = mean_se(distances(responses))
    return row


def distances(responses: Sequence[Response]) -> Array:
    """Return the mean over draws of the sum of log pi - log pi_0 of each answer, in nats. [P]."""
    means: list[float] = []
    for response in responses:
        sums: list[float] = []
        for candidate in response.candidates:
            entries = (candidate.choice.get("logprobs") or {}).get("content") or ()
            gaps = [entry.get("aligned_logprob", entry["logprob"]) for entry in entries]
            sums.append(sum(gaps) - sum(entry["logprob"] for entry in entries))
        means.append(float(np.mean(sums)))
    return np.array(means)


def at_equal_distance(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the gold of each form at equal distances, by interpolation between its betas."""
    start = next(row for row in rows if row["form"] == "frozen")
    levels: list[dict[str, Any]] = []
    for form in FORMS:
        curve = [start, *(row for row in rows if row["form"] == form)]
        kl = [row["kl"] for row in curve]
        worth = [row["gold"] for row in curve]
        level_row: dict[str, Any] = {"form": form}
        for level in LEVELS:
            inside = level <= max(kl)
            value = float(np.interp(level, kl, worth)) if inside else float("nan")
            level_row[f"gold_at_{level:g}"] = value
        levels.append(level_row)
    return levels


def show(rows: Sequence[Mapping[str, Any]], levels: Sequence[Mapping[str, Any]]) -> None:
    """Print both tables."""
    table = Table("form", "beta", "KL, nats", "gold", title="Sampled at temperature 1, ± s.e.")
    for row in rows:
        kl = figure(row["kl"], row["kl_se"])
        table.add_row(row["form"], f"{row['beta']:g}", kl, figure(row["gold"], row["gold_se"]))
    OUT.print(table)
    heads = [f"gold at {level:g} nats" for level in LEVELS]
    table = Table("form", *heads, title="Gold at equal distance, interpolated")
    for row in levels:
        table.add_row(row["form"], *(f"{row[f'gold_at_{level:g}']:.2f}" for level in LEVELS))
    OUT.print(table)


async def run(seed: int, n_prompts: int) -> None:
    """Measure, print and record."""
    OUT.print(__doc__, highlight=False)
    questions = world.prompts(n_prompts, seed)
    async with serving() as flow:
        rows = await measure(flow, questions, seed)
    levels = at_equal_distance(rows)
    show(rows, levels)
    setup = {"prompts": n_prompts, "draws": DRAWS, "temperature": 1.0, "levels": levels}
    baseline = "the frozen model, greedy, and the published top 20 with the tail kept"
    OUT.print("written:", record("vas_forms", baseline=baseline, seed=seed, rows=rows, setup=setup))


def main() -> None:
    """Run from the command line."""
    options = argument_parser(__doc__, prompts=96).parse_args()
    asyncio.run(run(options.seed, options.prompts))


if __name__ == "__main__":
    main()
