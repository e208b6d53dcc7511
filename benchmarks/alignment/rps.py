"""Robust preference selection on the embedded demo, against best-of-k with equal budget.

The claim (2510.20498): if a model saw few examples of a direction, it is better to draw from k
directions near it and to select by the original direction than to draw k times from the direction
itself. The paper's theorem says that the pool dominates.

    python benchmarks/alignment/rps.py
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.alignment.flow import Flow, generated_tokens, projected, selected_texts, serving
from benchmarks.alignment.report import (
    OUT,
    argument_parser,
    difference,
    mean_se,
    row_figure,
    sign_of,
)
from benchmarks.demo.direction import TRAINED_DEGREES, direction_at
from benchmarks.record import record
from infer_align.demo import world
from infer_align.flow.response import Response
from infer_align.objectives import project
from infer_align.types import Array

TARGETS = (-60, -45, -35, -20, 0, 20, 35, 45, 60)
K = 5
MAX_ANGLE = 30.0
BASELINE = "best of 5 at the target"
UNIFORM = "RPS, uniform"
PUBLISHED = "RPS, the authors' grid"
CLAMPED = "best of 5, target clamped"
GREEDY = "greedy at the target"
NEIGHBORHOODS = {BASELINE: "none", UNIFORM: "uniform", PUBLISHED: "published"}


@dataclass(frozen=True, slots=True)
class Answers:
    """One answer per question, and the mean number of generated tokens."""

    texts: Sequence[str]
    tokens: float


async def answer(
    flow: Flow, questions: Sequence[str], seed: int, degrees: int
) -> dict[str, Answers]:
    """Answer all questions in each way."""
    answers: dict[str, Answers] = {}
    for name, neighborhood in NEIGHBORHOODS.items():
        responses = await flow.ask_all(questions, seed, _align(degrees, neighborhood))
        answers[name] = _selected(responses)
    clamped = max(-TRAINED_DEGREES, min(TRAINED_DEGREES, degrees))
    responses = await flow.ask_all(questions, seed, _align(clamped, "none"))
    pairs = zip(questions, responses, strict=True)
    calls = [_select_along(flow, question, response, degrees) for question, response in pairs]
    answers[CLAMPED] = Answers(
        await asyncio.gather(*calls), float(generated_tokens(responses).mean())
    )
    dpa = {"dpa": {"direction": direction_at(degrees)}}
    answers[GREEDY] = _selected(await flow.ask_all(questions, seed, dpa, temperature=0))
    return answers


def _align(degrees: float, neighborhood: str) -> Mapping[str, Any]:
    rps = {"k": K, "max_angle": MAX_ANGLE, "neighborhood": neighborhood}
    return {"dpa": {"direction": direction_at(degrees)}, "rps": rps, "rewards": {"preference": 1.0}}


def _selected(responses: Sequence[Response]) -> Answers:
    return Answers(selected_texts(responses), float(generated_tokens(responses).mean()))


async def _select_along(flow: Flow, question: str, response: Response, degrees: float) -> str:
    """Select by the served reward along another direction than the candidates were drawn for."""
    reward = flow.rewards["preference"]
    messages = [{"role": "user", "content": question}]
    scores = await reward.score(messages, response.candidates)
    projection = project(direction_at(degrees), scores.values, reward.attributes).mean(0)
    return response.candidates[int(projection.argmax())].text


def rows_of(
    questions: Sequence[str], degrees: int, answers: Mapping[str, Answers]
) -> list[dict[str, Any]]:
    """Return one row per way: exact v . r at the target, and the difference to the baseline."""
    baseline = projected(questions, answers[BASELINE].texts, degrees)
    rows: list[dict[str, Any]] = []
    for name, each in answers.items():
        values = projected(questions, each.texts, degrees)
        rows.append(_row(degrees, name, values, baseline, each.tokens))
    return rows


def _row(degrees: int, name: str, values: Array, baseline: Array, tokens: float) -> dict[str, Any]:
    mean, error = mean_se(values)
    gap, gap_error = mean_se(values - baseline)
    # Rounding errors of equal answers are no difference.
    sign = np.sign(np.round(values - baseline, 9))
    return {
        "target": degrees,
        "trained": abs(degrees) <= TRAINED_DEGREES,
        "answer": name,
        "projected": mean,
        "projected_se": error,
        "minus_baseline": gap,
        "minus_baseline_se": gap_error,
        "win": float((sign == 1).mean()),
        "tie": float((sign == 0).mean()),
        "loss": float((sign == -1).mean()),
        "tokens": tokens,
    }


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """State in words for which targets each way beats the baseline."""
    lines: list[str] = []
    for name in (UNIFORM, PUBLISHED, CLAMPED):
        for trained, place in ((False, "beyond the trained range"), (True, "inside it")):
            matches = [row for row in rows if row["answer"] == name and row["trained"] is trained]
            better = _targets(matches, 1)
            worse = _targets(matches, -1)
            lines.append(
                f"{name}, {place}: better at {better or 'none'}, worse at {worse or 'none'} "
                f"of {len(matches)} targets."
            )
    return lines


def _targets(rows: Sequence[dict[str, Any]], sign: int) -> list[int]:
    """Return the targets whose difference to the baseline has this sign."""
    targets: list[int] = []
    for row in rows:
        if sign_of(row["minus_baseline"], row["minus_baseline_se"]) == sign:
            targets.append(row["target"])
    return targets


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    heads = ("target", "trained", "answer", "v . r", "- best of 5", "win / tie / loss, %", "tokens")
    title = "Exact reward along the target, ± s.e.; bold: more than two standard errors"
    table = Table(*heads, title=title)
    for row in rows:
        gap = difference(row["minus_baseline"], row["minus_baseline_se"])
        shares = " / ".join(f"{100 * row[name]:.0f}" for name in ("win", "tie", "loss"))
        is_baseline = row["answer"] == BASELINE
        table.add_row(
            str(row["target"]),
            "yes" if row["trained"] else "",
            row["answer"],
            row_figure(row, "projected"),
            "" if is_baseline else gap,
            "" if is_baseline else shares,
            f"{row['tokens']:.0f}",
            end_section=row["answer"] == GREEDY,
        )
    OUT.print(table)


def introduce(seed: int, n_prompts: int) -> None:
    """Print the claim and the setup."""
    OUT.print(__doc__)
    OUT.print(
        f"{n_prompts} questions, k = {K}, within {MAX_ANGLE:g} degrees, temperature 1, seed "
        f"{seed}. "
        "Standard errors are over questions, and differences are paired.\n"
        f"Every way but greedy draws {K} answers and selects with one reward model (`preference`) "
        f"along the ORIGINAL target. "
        "The table compares the exact v . r of the selected answer, which the reward model only "
        "estimates.\n"
        f"The model was not trained on directions beyond {TRAINED_DEGREES:g} degrees. "
        f'"{CLAMPED}" is the fair control: a user who knows the trained range can choose its '
        f"edge.\n",
        highlight=False,
    )


async def run(seed: int, n_prompts: int) -> None:
    """Answer the questions, print the table, and record the results."""
    introduce(seed, n_prompts)
    questions = world.prompts(n_prompts, seed)
    rows: list[dict[str, Any]] = []
    async with serving() as flow:
        for degrees in TARGETS:
            rows += rows_of(questions, degrees, await answer(flow, questions, seed, degrees))
    show(rows)
    lines = verdicts(rows)
    OUT.print("\n".join(lines), highlight=False)
    setup = {
        "prompts": n_prompts,
        "k": K,
        "max_angle": MAX_ANGLE,
        "trained_degrees": TRAINED_DEGREES,
        "temperature": 1.0,
        "verdicts": lines,
    }
    OUT.print("written:", record("rps", baseline=BASELINE, seed=seed, rows=rows, setup=setup))


def main() -> None:
    """Run from the command line."""
    options = argument_parser(__doc__, prompts=200).parse_args()
    asyncio.run(run(options.seed, options.prompts))


if __name__ == "__main__":
    main()
