"""Directional preference alignment on the embedded demo: answers that follow an angle.

The claim (Wang et al., 2402.18571): if the system prompt carries a direction v = (cos t, sin t)
over helpfulness and verbosity, one model trades one for the other as t changes, without further
fine-tuning.

    python benchmarks/alignment/dpa.py
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.alignment.flow import (
    Flow,
    attributes,
    generated_tokens,
    gold,
    projected,
    serving,
    texts,
)
from benchmarks.alignment.report import OUT, argument_parser, mean_se, row_figure, sign_of
from benchmarks.demo.direction import ATTRIBUTES, TRAINED_DEGREES, direction_at
from benchmarks.record import record
from infer_align.demo import world
from infer_align.flow.response import Response
from infer_align.types import Array

ANGLES = (-90, -60, -45, -30, -20, -10, 0, 10, 20, 30, 45, 60, 90)
DRAWS = 4


async def measure(
    flow: Flow, questions: Sequence[str], seed: int
) -> tuple[list[dict[str, Any]], dict[int, Array]]:
    """Return one row per angle and decoding, and the verbosity [P] at each angle."""
    plain = await flow.ask_all(questions, seed, n=DRAWS)
    greedy = await flow.ask_all(questions, seed, temperature=0)
    rows = [
        _row("no direction", None, questions, plain),
        _row("no direction, greedy", None, questions, greedy),
    ]
    verbosity: dict[int, Array] = {}
    for degrees in ANGLES:
        dpa = {"dpa": {"direction": direction_at(degrees)}}
        scored = {**dpa, "rewards": {"preference": 1.0}}
        sampled = await flow.ask_all(questions, seed, scored, n=DRAWS)
        verbosity[degrees] = _attribute(questions, sampled, ATTRIBUTES.index("verbosity"))
        rows.append(_row(f"{degrees} degrees", degrees, questions, sampled))
        greedy = await flow.ask_all(questions, seed, dpa, temperature=0)
        rows.append(_row(f"{degrees} degrees, greedy", degrees, questions, greedy))
    return rows, verbosity


def _row(
    name: str, degrees: int | None, questions: Sequence[str], responses: Sequence[Response]
) -> dict[str, Any]:
    row: dict[str, Any] = {"answer": name, "degrees": degrees}
    row["trained"] = degrees is not None and abs(degrees) <= TRAINED_DEGREES
    for index, attribute in enumerate(ATTRIBUTES):
        row[attribute], row[f"{attribute}_se"] = mean_se(_attribute(questions, responses, index))
    # One draw of every question at a time.
    draws = list(zip(*texts(responses), strict=True))
    if degrees is not None:
        projections = np.stack([projected(questions, draw, degrees) for draw in draws])
        row["projected"], row["projected_se"] = mean_se(projections.mean(0))
    worth = np.stack([gold(questions, draw) for draw in draws])
    row["gold"], row["gold_se"] = mean_se(worth.mean(0))
    row["tokens"] = float(generated_tokens(responses).mean()) / len(responses[0].candidates)
    return row


def _attribute(questions: Sequence[str], responses: Sequence[Response], index: int) -> Array:
    """Return an attribute [P], the mean over the draws."""
    means: list[float] = []
    for question, draws in zip(questions, texts(responses), strict=True):
        means.append(float(np.mean([attributes(question, text)[index] for text in draws])))
    return np.array(means)


def steps(verbosity: dict[int, Array]) -> list[dict[str, Any]]:
    """Return the rise of verbosity from each angle to the next, paired by question."""
    rises: list[dict[str, Any]] = []
    for low, high in pairwise(ANGLES):
        rise, error = mean_se(verbosity[high] - verbosity[low])
        trained = max(abs(low), abs(high)) <= TRAINED_DEGREES
        rises.append({"from": low, "to": high, "rise": rise, "rise_se": error, "trained": trained})
    return rises


def verdicts(rises: Sequence[dict[str, Any]]) -> list[str]:
    """State in words where verbosity is monotone in the angle."""
    inside = [step for step in rises if step["trained"]]
    outside = [step for step in rises if not step["trained"]]
    return [
        _verdict(f"within the trained {TRAINED_DEGREES:g} degrees", inside),
        _verdict("beyond them", outside),
    ]


def _verdict(place: str, rises: Sequence[dict[str, Any]]) -> str:
    signs = [sign_of(step["rise"], step["rise_se"]) for step in rises]
    rising = signs.count(1)
    word = "MONOTONE" if rising == len(rises) else "NOT MONOTONE"
    details = ", ".join(
        f"{step['from']} to {step['to']}: {step['rise']:+.2f} ± {step['rise_se']:.2f}"
        for step in rises
    )
    return (
        f"Verbosity over the angle {place}: {word}. Of {len(rises)} steps, {rising} rise by more "
        f"than "
        f"two standard errors and {signs.count(-1)} fall: {details}."
    )


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    columns = ("helpfulness", "verbosity", "projected", "gold")
    heads = ("answer", "trained", "helpfulness", "verbosity", "v . r", "gold", "tokens")
    table = Table(*heads, title="Mean of the answers, ± s.e.")
    for row in rows:
        cells = [row_figure(row, name) for name in columns]
        trained = "yes" if row["trained"] else ""
        table.add_row(row["answer"], trained, *cells, f"{row['tokens']:.0f}")
    OUT.print(table)


def introduce(seed: int, n_prompts: int) -> None:
    """Print the claim and the setup."""
    OUT.print(__doc__)
    OUT.print(
        f"{n_prompts} questions, {DRAWS} draws each at temperature 1 and one greedy, seed {seed}. "
        "Standard errors are over questions.\n"
        "Helpfulness, verbosity and gold are exact, computed from the text. Baseline: the same "
        "model without a direction.\n"
        "The model's directed documents were selected by exact v . r, at angles within "
        f"{TRAINED_DEGREES:g} degrees, nine in ten within 20. This selection also taught it to be "
        f"right and polite "
        "whenever there is a direction, so compare the rows along the angle.\n",
        highlight=False,
    )


async def run(seed: int, n_prompts: int) -> None:
    """Answer the questions, print the table, and record the results."""
    introduce(seed, n_prompts)
    questions = world.prompts(n_prompts, seed)
    async with serving() as flow:
        rows, verbosity = await measure(flow, questions, seed)
    show(rows)
    rises = steps(verbosity)
    lines = verdicts(rises)
    OUT.print("\n".join(lines), highlight=False)
    setup: dict[str, Any] = {
        "prompts": n_prompts,
        "draws": DRAWS,
        "trained_degrees": TRAINED_DEGREES,
        "temperature": 1.0,
        "steps": rises,
        "verdicts": lines,
    }
    baseline = "the same model without a direction, and greedy"
    OUT.print("written:", record("dpa", baseline=baseline, seed=seed, rows=rows, setup=setup))


def main() -> None:
    """Run from the command line."""
    options = argument_parser(__doc__, prompts=160).parse_args()
    asyncio.run(run(options.seed, options.prompts))


if __name__ == "__main__":
    main()
