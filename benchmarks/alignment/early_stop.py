"""Best-of-n whose losers are stopped early, on the embedded demo: what it saves, and what it costs.

The claim ("Fast Best-of-N Decoding via Speculative Rejection", 2410.20290): stopping the candidates that look worst half-way saves
most of the tokens and little of the quality. Here a value head says who looks worst (`align.early_stop`).

    python benchmarks/alignment/early_stop.py
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.alignment.flow import OUT, Flow, chosen, gold, mean_se, serving, shown
from benchmarks.record import record
from infer_align.demo import world
from infer_align.flow.response import Response
from infer_align.types import Array

FAMILY = (1, 2, 4, 6, 8, 12, 16, 24, 32)
N = 32
STOPPED = [(after, keep) for after in (3, 6, 12) for keep in (0.5, 0.25)]
GREEDY = "greedy"
REWARDS = {"quality": 1.0}


async def rows_of(flow: Flow, questions: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Plain best-of-n, then best of N with early stopping, each against the same tokens and against the same n."""
    family = [
        await _measured(flow, questions, seed, {"best_of_n": {"n": n}, "rewards": REWARDS})
        for n in FAMILY
    ]
    rows = [_row(f"best of {n}", found, family) for n, found in zip(FAMILY, family, strict=True)]
    for after, keep in STOPPED:
        early = {"values": {"helpful": 1.0}, "after": after, "keep": keep}
        wanted = {"best_of_n": {"n": N}, "rewards": REWARDS, "early_stop": early}
        name = f"best of {N}, after {after} tokens keep {keep:g}"
        rows.append(_row(name, await _measured(flow, questions, seed, wanted), family))
    rows.append(_row(GREEDY, await _measured(flow, questions, seed, None, temperature=0), family))
    return rows


Measured = tuple[
    Array, Array, Array
]  # of each question: gold, tokens, tokens that are said to be saved


async def _measured(
    flow: Flow, questions: Sequence[str], seed: int, wanted: Mapping[str, Any] | None, **body: Any
) -> Measured:
    responses = await flow.ask_all(questions, seed, wanted, **body)
    saved = np.array([float(response.saved_tokens) for response in responses])
    return (
        gold(questions, chosen(responses)),
        np.array([_spent(response) for response in responses]),
        saved,
    )


def _spent(response: Response) -> float:
    return float(sum(candidate.completion_tokens for candidate in response.candidates))


def _row(name: str, found: Measured, family: Sequence[Measured]) -> dict[str, Any]:
    values, spent, saved = found
    mean, error = mean_se(values)
    same_budget, budget_error = mean_se(values - _at_budget(float(spent.mean()), family))
    whole, whole_error = mean_se(values - family[-1][0])
    return {
        "answer": name,
        "tokens": float(spent.mean()),
        "saved": float(saved.mean()),
        "gold": mean,
        "gold_se": error,
        "minus_budget": same_budget,
        "minus_budget_se": budget_error,
        "minus_whole": whole,
        "minus_whole_se": whole_error,
    }


def _at_budget(tokens: float, family: Sequence[Measured]) -> Array:
    """Gold of plain best-of-n at so many tokens, question by question, between the two n beside it."""
    costs = [float(spent.mean()) for _, spent, _ in family]
    upper = min(max(1, int(np.searchsorted(costs, tokens))), len(family) - 1)
    share = float(
        np.clip((tokens - costs[upper - 1]) / (costs[upper] - costs[upper - 1]), 0.0, 1.0)
    )
    return np.asarray((1 - share) * family[upper - 1][0] + share * family[upper][0])


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Where the claim holds, in words."""
    said, whole = [], next(row for row in rows if row["answer"] == f"best of {N}")
    for row in rows:
        if "after" in row["answer"]:
            gap, error = row["minus_budget"], row["minus_budget_se"]
            word = (
                "BETTER"
                if gap > 2 * error
                else "WORSE"
                if gap < -2 * error
                else "NO DIFFERENCE within two standard errors"
            )
            share = row["tokens"] / whole["tokens"]
            said.append(
                f"{row['answer']}: {share:.0%} of the tokens of best of {N}; than best-of-n at the same tokens: {word}."
            )
    return said


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table."""
    heads = ("answer", "tokens", "said to be saved", "gold", "- same tokens", f"- best of {N}")
    table = Table(
        *heads,
        title="Gold of the pick, ± s.e.; differences paired by question, bold: more than two standard errors",
    )
    for row in rows:
        gaps = [
            shown(row[f"minus_{key}"], row[f"minus_{key}_se"], sign=True)
            for key in ("budget", "whole")
        ]
        gold_of = shown(row["gold"], row["gold_se"])
        table.add_row(
            row["answer"],
            f"{row['tokens']:.0f}",
            f"{row['saved']:.0f}" if row["saved"] else "",
            gold_of,
            *gaps,
        )
    OUT.print(table)


async def run(seed: int, n_prompts: int) -> None:
    """Ask, tabulate, judge, record."""
    OUT.print(__doc__)
    OUT.print(
        f"{n_prompts} questions, temperature 1, seed {seed}; picked by five proxies (uwo), estimates by the value fitted to them."
    )
    async with serving() as flow:
        rows = await rows_of(flow, world.prompts(n_prompts, seed), seed)
    show(rows)
    said = verdicts(rows)
    OUT.print("\n".join(said), highlight=False)
    setup = {"prompts": n_prompts, "n": N, "temperature": 1.0, "verdicts": said}
    baseline = "plain best-of-n at the same tokens, best of 32, one sample and greedy"
    OUT.print(
        f"written: {record('early_stop', baseline=baseline, seed=seed, rows=rows, setup=setup)}"
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--seed", type=int, default=2024)
    options = parser.parse_args()
    asyncio.run(run(options.seed, options.prompts))


if __name__ == "__main__":
    main()
