"""Guidance by prompts on the embedded demo: how far a prompt's difference steers, without training.

Two claims. (1) Adding scale x (logprobs under a prompt - logprobs without it) to the logits is
graded between 0, the frozen model, and 1, which asks for the trait, and goes beyond asking above 1
(Sanchez et al., 2306.17806). (2) The same difference, summed over a finished answer, is a reward
that needs no reward model (Xu et al., CDR).

    python benchmarks/alignment/guidance.py
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from rich.table import Table

from benchmarks.alignment.best_of_n import UNCERTAINTY_WEIGHT
from benchmarks.alignment.flow import Flow, generated_tokens, gold, serving, texts
from benchmarks.alignment.report import (
    OUT,
    argument_parser,
    difference,
    figure,
    mean_se,
    row_figure,
)
from benchmarks.demo.direction import direction_at
from benchmarks.record import RESULTS, record
from infer_align import objectives
from infer_align.decoding.sequences import SequenceQuery
from infer_align.demo import world
from infer_align.flow.response import Response
from infer_align.methods.best_of_n import expected_best
from infer_align.methods.dpa import system_prompt
from infer_align.types import Array

# The direction that gold likes best, towards brevity. The demo's page had named it before.
ASKED = -20
# Every direction that the density ratio is measured with, so that the best one is not alone.
DIRECTIONS = (-20, -10, 0, 20, 30)
SCALES = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
DRAWS = 4
POOL = 64
SIZES = (1, 2, 4, 8, 16, 32, 64)
# The beta of the shipped head that its proxy chose (docs/vas.md).
HEAD = {"helpful": 16.0}
SEED = 41_017


@dataclass(frozen=True, slots=True)
class Row:
    """One way to answer: gold [P] of every question, tokens and forward passes of one answer."""

    answer: str
    gold: Array
    tokens: float  # sampled for one answer that is returned
    passes: float  # tokens read by the frozen model for it: the answer's in every context
    section: str


def trait(degrees: float) -> dict[str, str]:
    """Return the trait whose prompt asks for a direction, as the demo was trained on it."""
    return {"prompt": system_prompt(direction_at(degrees))}


def guided(scale: float, degrees: float = ASKED) -> dict[str, Any]:
    """Return the `align` object that guides by one direction."""
    return {"guidance": {"scale": {"asked": scale}, "traits": {"asked": trait(degrees)}}}


async def single_draws(flow: Flow, questions: Sequence[str], seed: int) -> list[Row]:
    """Answer with one draw each: frozen, asked, guided and value-steered."""
    rows: list[Row] = []

    async def add(
        name: str,
        section: str,
        contexts: int = 1,
        align: Mapping[str, Any] | None = None,
        **body: Any,
    ) -> None:
        rows.append(
            _row(
                name,
                section,
                contexts,
                questions,
                await flow.ask_all(questions, seed, align, **body),
            )
        )

    dpa = {"dpa": {"direction": direction_at(ASKED)}, "rewards": {}}
    await add("one sample", "frozen", n=DRAWS)
    await add("greedy", "frozen", temperature=0)
    await add("asked", "asked", align=dpa, n=DRAWS)
    await add("asked, greedy", "asked", align=dpa, temperature=0)
    for scale in SCALES:
        # Scale 0 adds no context.
        contexts = 2 if scale else 1
        await add(f"guidance {scale:g}", "guidance", contexts, guided(scale), n=DRAWS)
    await add("guidance 2, greedy", "guidance", 2, guided(2.0), temperature=0)
    await add("vas, helpful 16", "vas", align={"vas": {"beta": HEAD}}, n=DRAWS)
    await add("vas, helpful 16, greedy", "vas", align={"vas": {"beta": HEAD}}, temperature=0)
    return rows


def _row(
    name: str, section: str, contexts: int, questions: Sequence[str], responses: Sequence[Response]
) -> Row:
    # One draw of every question at a time.
    draws = list(zip(*texts(responses), strict=True))
    worth = np.stack([gold(questions, draw) for draw in draws]).mean(0)
    tokens = float(generated_tokens(responses).mean()) / len(draws)
    return Row(name, worth, tokens, contexts * tokens, section)


async def pools(flow: Flow, questions: Sequence[str], seed: int) -> list[Response]:
    """Draw the pool of every question, scored by the demo's five reward models."""
    align = {"best_of_n": {"n": POOL}, "rewards": {"quality": 1.0}}
    return await flow.ask_all(questions, seed, align)


async def ratios(
    flow: Flow, questions: Sequence[str], answers: Sequence[Sequence[str]], degrees: float
) -> tuple[Array, Array]:
    """Return log p(answer | direction) - log p(answer) of every answer: sums and means per token.

    Both are [P, N].
    """
    slots = asyncio.Semaphore(4)

    async def read(question: str, texts_read: Sequence[str]) -> tuple[list[float], list[float]]:
        user = {"role": "user", "content": question}
        system = {"role": "system", "content": system_prompt(direction_at(degrees))}
        async with slots:
            plain, asked = [
                await flow.engine.sequence_logprobs(
                    SequenceQuery({"messages": messages}, tuple(texts_read))
                )
                for messages in ([user], [system, user])
            ]
        sums = [
            float(a.sum() - b.sum()) for a, b in zip(asked.logprobs, plain.logprobs, strict=True)
        ]
        lengths = [max(1, len(each)) for each in plain.logprobs]
        return sums, [total / length for total, length in zip(sums, lengths, strict=True)]

    pairs = await asyncio.gather(
        *(read(question, pool) for question, pool in zip(questions, answers, strict=True))
    )
    return np.array([sums for sums, _ in pairs]), np.array([means for _, means in pairs])


async def best_of_n(
    flow: Flow, questions: Sequence[str], seed: int
) -> tuple[list[Row], dict[str, dict[int, Array]]]:
    """Select from the pools by reward models and by density ratios.

    Returns:
        The rows, and per selector the gold [P] of the selected answer by n.
    """
    responses = await pools(flow, questions, seed)
    answers = texts(responses)
    worth = np.stack([gold(questions, draw) for draw in zip(*answers, strict=True)], axis=1)
    members = np.stack([each.scores.members["quality"] for each in responses], axis=1)
    scores = {
        "uwo of five reward models": objectives.uwo(
            members.reshape(len(members), -1), UNCERTAINTY_WEIGHT
        ).reshape(worth.shape),
        "one reward model": members[0],
    }
    for degrees in DIRECTIONS:
        sums, means = await ratios(flow, questions, answers, degrees)
        scores[f"ratio {degrees}"] = sums
        scores[f"ratio {degrees}, per token"] = means
    scores["oracle"] = worth
    length = float(generated_tokens(responses).mean()) / POOL
    rows: list[Row] = []
    by_selector: dict[str, dict[int, Array]] = {}
    for name, selector in scores.items():
        curve = {n: _selected(selector, worth, n) for n in SIZES}
        by_selector[name] = curve
        reads = 1 if name.startswith(("uwo", "one", "oracle")) else 3
        for n in SIZES[1:]:
            rows.append(Row(f"best of {n}, {name}", curve[n], n * length, reads * n * length, name))
    return rows, by_selector


def _selected(selector: Array, worth: Array, n: int) -> Array:
    return np.array([expected_best(*pair, n) for pair in zip(selector, worth, strict=True)])


def table_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the recorded rows, with differences paired by question."""
    by_name = {row.answer: row for row in rows}
    recorded: list[dict[str, Any]] = []
    for row in rows:
        fields: dict[str, Any] = {
            "answer": row.answer,
            "section": row.section,
            "tokens": row.tokens,
            "passes": row.passes,
        }
        fields["gold"], fields["gold_se"] = mean_se(row.gold)
        for reference in ("one sample", "greedy", "asked"):
            gap = row.gold - by_name[reference].gold
            key = f"minus_{reference.replace(' ', '_')}"
            fields[key], fields[f"{key}_se"] = mean_se(gap)
        recorded.append(fields)
    return recorded


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table. A difference in bold is more than three standard errors from zero."""
    heads = ["answer", "tokens", "passes", "gold", "- one sample", "- greedy", "- asked"]
    table = Table(*heads, title="Gold reward of the answer, ± standard error over questions")
    printed = {1, 8, 64}
    for row in rows:
        parts = row["answer"].split()
        if parts[0] == "best" and int(parts[2].rstrip(",")) not in printed:
            continue
        cells = [row["answer"], f"{row['tokens']:.0f}", f"{row['passes']:.0f}"]
        cells.append(row_figure(row, "gold"))
        for key in ("minus_one_sample", "minus_greedy", "minus_asked"):
            cells.append(difference(row[key], row[f"{key}_se"], significance=3.0))
        table.add_row(*cells)
    OUT.print(table)


def verdicts(rows: Sequence[Row], by_selector: Mapping[str, Mapping[int, Array]]) -> list[str]:
    """State in words which claims hold."""
    by_name = {row.answer: row for row in rows}
    lines: list[str] = []
    rising = [by_name[f"guidance {scale:g}"].gold for scale in SCALES if 0 <= scale <= 2]
    gaps = [mean_se(b - a) for a, b in pairwise(rising)]
    holds = all(mean > 0 for mean, _ in gaps)
    steps = ", ".join(f"{mean:+.2f} ± {error:.2f}" for mean, error in gaps)
    lines.append(f"guidance rises from 0 to 2: {'HOLDS' if holds else 'DOES NOT HOLD'} ({steps}).")
    mean, error = mean_se(by_name["guidance 2"].gold)
    reached = "REACHED" if mean >= 2.2 else "NOT REACHED"
    lines.append(f"guidance 2 has 2.2 gold in one draw: {reached} ({figure(mean, error)}).")
    uwo = by_selector["uwo of five reward models"][POOL]
    for name in (f"ratio {ASKED}", f"ratio {ASKED}, per token"):
        mean, error = mean_se(by_selector[name][POOL] - uwo)
        reached = "REACHED" if mean >= 0.3 else "NOT REACHED"
        lines.append(
            f"best of {POOL} by {name} is 0.3 above uwo: {reached} ({mean:+.2f} ± {error:.2f})."
        )
    return lines


def plot(rows: Sequence[Row], by_selector: Mapping[str, Mapping[int, Array]]) -> None:
    """Plot gold against scale on the left, and gold against n on the right."""
    mpl.use("Agg")
    plot_figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    by_name = {row.answer: row for row in rows}
    points = np.array([mean_se(by_name[f"guidance {scale:g}"].gold) for scale in SCALES])
    left.errorbar(SCALES, points[:, 0], points[:, 1], marker="o", label="guidance, one draw")
    styles = {"one sample": "-", "greedy": "--", "asked": "-.", "vas, helpful 16": ":"}
    for name, style in styles.items():
        level = by_name[name].gold.mean()
        left.axhline(level, color="0.5", linewidth=0.8, linestyle=style, label=name)
    left.set(xlabel="scale", ylabel="gold reward", title="Guidance by one prompt")
    shown = ("uwo of five reward models", "one reward model", f"ratio {ASKED}", "ratio 30")
    for name in (*shown, "oracle"):
        curve = by_selector[name]
        points = np.array([mean_se(curve[n]) for n in SIZES])
        right.errorbar(SIZES, points[:, 0], points[:, 1], marker="o", markersize=3, label=name)
    right.set_xscale("log", base=2)
    right.set_xticks(SIZES, [str(n) for n in SIZES])
    right.set(xlabel="n, answers drawn", title="Best of n, by selector")
    for axes in (left, right):
        axes.legend(fontsize=7)
    plot_figure.savefig(RESULTS / "guidance.png", dpi=110)
    plt.close(plot_figure)


async def run(seed: int, n_prompts: int) -> None:
    """Answer the questions, print the table, record the results, and plot them."""
    OUT.print(__doc__, highlight=False)
    questions = world.prompts(n_prompts, seed)
    async with serving() as flow:
        single = await single_draws(flow, questions, seed)
        selected, by_selector = await best_of_n(flow, questions, seed)
    rows = [*single, *selected]
    recorded = table_rows(rows)
    show(recorded)
    lines = verdicts(rows, by_selector)
    OUT.print("\n".join(lines), highlight=False)
    setup = {
        "prompts": n_prompts,
        "draws": DRAWS,
        "pool": POOL,
        "temperature": 1.0,
        "direction": ASKED,
        "verdicts": lines,
    }
    baseline = "one sample, greedy, asking, the VAS head, best-of-n by the demo's reward models"
    written = record("guidance", baseline=baseline, seed=seed, rows=recorded, setup=setup)
    OUT.print("written:", written)
    plot(rows, by_selector)


def main() -> None:
    """Run from the command line."""
    parser = argument_parser(__doc__, prompts=128)
    parser.set_defaults(seed=SEED)
    options = parser.parse_args()
    asyncio.run(run(options.seed, options.prompts))


if __name__ == "__main__":
    main()
