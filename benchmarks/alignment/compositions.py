"""Combined methods on the embedded demo, against their parts with the same number of answers.

DPA + VAS         a direction in the system prompt, and every token steered by a value RPS + UWO
neighbouring directions, selected by the target's reward and by an ensemble with its uncertainty
judge + ensemble  the served model's own judgement together with the five reward models

    python benchmarks/alignment/compositions.py
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.alignment.flow import (
    Flow,
    attributes,
    generated_tokens,
    gold,
    projected,
    selected_texts,
    serving,
)
from benchmarks.alignment.report import OUT, argument_parser, mean_se, row_figure, sign_of
from benchmarks.demo.direction import direction_at
from benchmarks.record import record
from infer_align.demo import world
from infer_align.flow.response import Response
from infer_align.types import Array

BRIEF = {"brief": 4.0}
HELPFUL = {"helpful": 4.0}
JUDGE = {"mode": "score", "scale": 100}
# Weight of the ensemble added to v . r, and of the ensemble added to the judge: their spreads are
# then alike.
QUALITY_WEIGHT = 0.5
N = 8
# Combination -> its parts.
PARTS = {
    "DPA + VAS helpful": ("DPA at 10", "VAS helpful"),
    "DPA + VAS brief": ("DPA at 10", "VAS brief"),
    "RPS + UWO": ("RPS", "best of 5 + UWO", "RPS + mean"),
    f"best of {N}, judge + ensemble": (f"best of {N}, ensemble", f"best of {N}, judge"),
}
WORDS = {1: "better", 0: "no different", -1: "worse"}


@dataclass(frozen=True, slots=True)
class Way:
    """One way to answer: the request's `align`, and the angle to measure v . r at."""

    section: str
    name: str
    align: Mapping[str, Any]
    degrees: float | None = None


# Answer -> measure -> [P].
Measures = Mapping[str, Mapping[str, Array]]


def ways() -> list[Way]:
    """Return all ways to answer."""
    return [*_direction_and_value(), *_neighbours_and_ensemble(), *_judge_and_ensemble()]


def _direction_and_value() -> list[Way]:
    section = "DPA + VAS"
    dpa = {"dpa": {"direction": direction_at(10)}}
    helpful = {"vas": {"beta": HELPFUL}}
    brief = {"vas": {"beta": BRIEF}}
    return [
        Way(section, "DPA at 10", dpa, 10),
        Way(section, "VAS helpful", helpful, 10),
        Way(section, "VAS brief", brief, 10),
        Way(section, "DPA + VAS helpful", {**dpa, **helpful}, 10),
        Way(section, "DPA + VAS brief", {**dpa, **brief}, 10),
    ]


def _neighbours_and_ensemble() -> list[Way]:
    section = "RPS + UWO"
    dpa = {"dpa": {"direction": direction_at(45)}}
    rps = {**dpa, "rps": {"k": 5}}
    target_only = {**dpa, "rps": {"k": 5, "neighborhood": "none"}}
    preference = {"rewards": {"preference": 1.0}}
    both = {"rewards": {"preference": 1.0, "quality": QUALITY_WEIGHT}}
    uwo = {**both, "ensemble": {"objective": "uwo"}}
    mean = {**both, "ensemble": {"objective": "mean"}}
    return [
        Way(section, "best of 5 at 45", {**target_only, **preference}, 45),
        Way(section, "best of 5 + UWO", {**target_only, **uwo}, 45),
        Way(section, "RPS", {**rps, **preference}, 45),
        Way(section, "RPS + mean", {**rps, **mean}, 45),
        Way(section, "RPS + UWO", {**rps, **uwo}, 45),
    ]


def _judge_and_ensemble() -> list[Way]:
    section = "judge + ensemble"
    draws = {"best_of_n": {"n": N}}
    ensemble = {**draws, "rewards": {"quality": 1.0}}
    judge = {**draws, "rewards": {}, "trust_judge": JUDGE}
    pairwise = {**draws, "rewards": {}, "trust_judge": {"mode": "pairwise"}}
    both = {**draws, "rewards": {"quality": QUALITY_WEIGHT}, "trust_judge": JUDGE}
    return [
        Way(section, f"best of {N}, ensemble", ensemble),
        Way(section, f"best of {N}, judge", judge),
        Way(section, f"best of {N}, pairwise judge", pairwise),
        Way(section, f"best of {N}, judge + ensemble", both),
    ]


async def measure(
    flow: Flow, questions: Sequence[str], seed: int
) -> tuple[list[dict[str, Any]], Measures]:
    """Return one row per way to answer, and its measures on each question."""
    sampled = await flow.ask_all(questions, seed)
    greedy = await flow.ask_all(questions, seed, temperature=0)
    rows = [
        _row("", "one sample", questions, sampled),
        _row("", "greedy", questions, greedy),
    ]
    measures: dict[str, dict[str, Array]] = {}
    for way in ways():
        responses = await flow.ask_all(questions, seed, way.align)
        row = _row(way.section, way.name, questions, responses)
        answers = selected_texts(responses)
        measures[way.name] = {"gold": gold(questions, answers)}
        if way.degrees is not None:
            projection = projected(questions, answers, way.degrees)
            measures[way.name]["v . r"] = projection
            row["projected"], row["projected_se"] = mean_se(projection)
        rows.append(row)
    return rows, measures


def _row(
    section: str, name: str, questions: Sequence[str], responses: Sequence[Response]
) -> dict[str, Any]:
    answers = selected_texts(responses)
    tokens = float(generated_tokens(responses).mean())
    row: dict[str, Any] = {"section": section, "answer": name, "tokens": tokens}
    row["gold"], row["gold_se"] = mean_se(gold(questions, answers))
    rewards = np.array([attributes(*pair) for pair in zip(questions, answers, strict=True)])
    row["verbosity"], row["verbosity_se"] = mean_se(rewards[:, 1])
    return row


def verdicts(measures: Measures) -> list[str]:
    """Compare each combination with each of its parts, in every measure, paired by question."""
    lines: list[str] = []
    for name, parts in PARTS.items():
        for part in parts:
            gaps: list[str] = []
            for measure_name, values in measures[name].items():
                gap, error = mean_se(values - measures[part][measure_name])
                word = WORDS[sign_of(gap, error)]
                gaps.append(f"{word} in {measure_name} ({gap:+.2f} ± {error:.2f})")
            lines.append(f"{name} against {part}: {', '.join(gaps)}.")
    return lines


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table("", "answer", "gold", "v . r", "verbosity", "tokens", title="Means ± s.e.")
    sections = [row["section"] for row in rows]
    for row, next_section in zip(rows, [*sections[1:], None], strict=True):
        cells = [row_figure(row, name) for name in ("gold", "projected", "verbosity")]
        is_last = row["section"] != next_section
        tokens = f"{row['tokens']:.0f}"
        table.add_row(row["section"], row["answer"], *cells, tokens, end_section=is_last)
    OUT.print(table)


def introduce(seed: int, n_prompts: int) -> None:
    """Print the claim and the setup."""
    OUT.print(__doc__)
    OUT.print(
        f"{n_prompts} questions, temperature 1, seed {seed}. Standard errors are over questions. "
        f"A combination is "
        "compared with each of its parts, which draw as many answers, paired by question.\n"
        "Gold, v . r (at 10 and at 45 degrees) and verbosity are exact. "
        f"VAS: helpful {HELPFUL['helpful']:g}, brief {BRIEF['brief']:g}.\n"
        f"Weight of the ensemble added to v . r, and to the judge (1 to 5): {QUALITY_WEIGHT}. "
        "The weights were set once and not tuned.\n",
        highlight=False,
    )


async def run(seed: int, n_prompts: int) -> None:
    """Answer the questions, print the table, and record the results."""
    introduce(seed, n_prompts)
    questions = world.prompts(n_prompts, seed)
    async with serving() as flow:
        rows, measures = await measure(flow, questions, seed)
    show(rows)
    lines = verdicts(measures)
    OUT.print("\n".join(lines), highlight=False)
    setup = {
        "prompts": n_prompts,
        "temperature": 1.0,
        "quality_weight": QUALITY_WEIGHT,
        "verdicts": lines,
    }
    baseline = "the parts of each combination"
    path = record("compositions", baseline=baseline, seed=seed, rows=rows, setup=setup)
    OUT.print("written:", path)


def main() -> None:
    """Run from the command line."""
    options = argument_parser(__doc__, prompts=200).parse_args()
    asyncio.run(run(options.seed, options.prompts))


if __name__ == "__main__":
    main()
