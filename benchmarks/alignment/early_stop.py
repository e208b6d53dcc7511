"""Best-of-n with early stopping on the embedded demo: the saved tokens, and their cost in quality.

The claim ("Fast Best-of-N Decoding via Speculative Rejection", 2410.20290): stopping the candidates
that look worst half-way saves most of the tokens and loses little quality. Here a value head
estimates the candidates (`align.early_stop`).

    python benchmarks/alignment/early_stop.py
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.alignment.flow import Flow, generated_tokens, gold, selected_texts, serving
from benchmarks.alignment.report import (
    OUT,
    argument_parser,
    difference,
    mean_se,
    row_figure,
    sign_of,
)
from benchmarks.record import record
from infer_align.demo import world
from infer_align.types import Array

# Plain best-of-n, for the quality at any number of tokens.
SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32)
N = 32
FIRST_CHECKPOINTS = (3, 6, 12)
SURVIVING_SHARES = (0.5, 0.25)
REWARDS = {"quality": 1.0}
WORDS = {1: "BETTER", 0: "NO DIFFERENCE within two standard errors", -1: "WORSE"}


@dataclass(frozen=True, slots=True)
class Measured:
    """One way to answer, per question: arrays are [P]."""

    gold: Array
    tokens: Array
    saved: Array  # the server's own estimate of the saved tokens


async def rows_of(flow: Flow, questions: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Return rows of plain best-of-n, of best-of-n with early stopping, and of greedy decoding."""
    plain: list[Measured] = []
    for n in SIZES:
        fields = {"best_of_n": {"n": n}, "rewards": REWARDS}
        plain.append(await _measure(flow, questions, seed, fields))
    rows = [_row(f"best of {n}", each, plain) for n, each in zip(SIZES, plain, strict=True)]
    for after in FIRST_CHECKPOINTS:
        for share in SURVIVING_SHARES:
            early_stop = {"values": {"helpful": 1.0}, "after": after, "keep": share}
            fields = {"best_of_n": {"n": N}, "rewards": REWARDS, "early_stop": early_stop}
            name = f"best of {N}, after {after} tokens keep {share:g}"
            rows.append(_row(name, await _measure(flow, questions, seed, fields), plain))
    greedy = await _measure(flow, questions, seed, None, temperature=0)
    rows.append(_row("greedy", greedy, plain))
    return rows


async def _measure(
    flow: Flow,
    questions: Sequence[str],
    seed: int,
    align_fields: Mapping[str, Any] | None,
    **body: Any,
) -> Measured:
    responses = await flow.ask_all(questions, seed, align_fields, **body)
    return Measured(
        gold=gold(questions, selected_texts(responses)),
        tokens=generated_tokens(responses),
        saved=np.array([float(response.saved_tokens) for response in responses]),
    )


def _row(name: str, measured: Measured, plain: Sequence[Measured]) -> dict[str, Any]:
    tokens = float(measured.tokens.mean())
    mean, error = mean_se(measured.gold)
    minus_budget, minus_budget_se = mean_se(measured.gold - _gold_at(tokens, plain))
    minus_whole, minus_whole_se = mean_se(measured.gold - plain[-1].gold)
    return {
        "answer": name,
        "tokens": tokens,
        "saved": float(measured.saved.mean()),
        "gold": mean,
        "gold_se": error,
        "minus_budget": minus_budget,
        "minus_budget_se": minus_budget_se,
        "minus_whole": minus_whole,
        "minus_whole_se": minus_whole_se,
    }


def _gold_at(tokens: float, plain: Sequence[Measured]) -> Array:
    """Return the gold [P] of plain best-of-n at a number of tokens, by interpolation."""
    costs = [float(each.tokens.mean()) for each in plain]
    upper = min(max(1, int(np.searchsorted(costs, tokens))), len(plain) - 1)
    lower = upper - 1
    position = (tokens - costs[lower]) / (costs[upper] - costs[lower])
    share = float(np.clip(position, 0.0, 1.0))
    return np.asarray((1 - share) * plain[lower].gold + share * plain[upper].gold)


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """State in words what early stopping saves, and how it compares at equal tokens."""
    full = next(row for row in rows if row["answer"] == f"best of {N}")
    lines: list[str] = []
    for row in rows:
        if "after" not in row["answer"]:
            continue
        word = WORDS[sign_of(row["minus_budget"], row["minus_budget_se"])]
        share = row["tokens"] / full["tokens"]
        lines.append(
            f"{row['answer']}: {share:.0%} of the tokens of best of {N}. "
            f"Compared with best-of-n at the same tokens: {word}."
        )
    return lines


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    heads = ("answer", "tokens", "reported as saved", "gold", "- same tokens", f"- best of {N}")
    title = (
        "Gold of the selected answer, ± s.e.; differences paired by question, "
        "bold: more than two standard errors"
    )
    table = Table(*heads, title=title)
    for row in rows:
        table.add_row(
            row["answer"],
            f"{row['tokens']:.0f}",
            f"{row['saved']:.0f}" if row["saved"] else "",
            row_figure(row, "gold"),
            difference(row["minus_budget"], row["minus_budget_se"]),
            difference(row["minus_whole"], row["minus_whole_se"]),
        )
    OUT.print(table)


async def run(seed: int, n_prompts: int) -> None:
    """Answer the questions, print the table, and record the results."""
    OUT.print(__doc__)
    OUT.print(
        f"{n_prompts} questions, temperature 1, seed {seed}. Five proxies select (uwo); "
        "the value that was fitted to them estimates the candidates."
    )
    async with serving() as flow:
        rows = await rows_of(flow, world.prompts(n_prompts, seed), seed)
    show(rows)
    lines = verdicts(rows)
    OUT.print("\n".join(lines), highlight=False)
    setup = {"prompts": n_prompts, "n": N, "temperature": 1.0, "verdicts": lines}
    baseline = "plain best-of-n at the same tokens, best of 32, one sample and greedy"
    path = record("early_stop", baseline=baseline, seed=seed, rows=rows, setup=setup)
    OUT.print("written:", path)


def main() -> None:
    """Run from the command line."""
    options = argument_parser(__doc__, prompts=256).parse_args()
    asyncio.run(run(options.seed, options.prompts))


if __name__ == "__main__":
    main()
