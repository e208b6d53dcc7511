"""Directional preference alignment on the embedded demo: whether the answers follow the angle, and how far.

The claim (Wang et al., 2402.18571): told a direction v = (cos t, sin t) over helpfulness and verbosity in its system prompt, one
model trades one for the other as t changes, without another fine-tuning.

    python benchmarks/alignment/dpa.py
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.alignment.flow import (
    OUT,
    Flow,
    attributes,
    gold,
    mean_se,
    projected,
    serving,
    shown,
    texts,
    tokens,
)
from benchmarks.demo.direction import TRAINED_DEGREES, direction_at
from benchmarks.record import record
from infer_align.demo import world
from infer_align.flow.response import Response
from infer_align.types import Array

ANGLES = (-90, -60, -45, -30, -20, -10, 0, 10, 20, 30, 45, 60, 90)
DRAWS = 4


async def measure(
    flow: Flow, questions: Sequence[str], seed: int
) -> tuple[list[dict[str, Any]], dict[int, Array]]:
    """One row for each way to ask, and the verbosity at each angle, [P]."""
    plain = await flow.ask_all(questions, seed, n=DRAWS)
    greedy = await flow.ask_all(questions, seed, temperature=0)
    rows = [
        _row("no direction", None, questions, plain),
        _row("no direction, greedy", None, questions, greedy),
    ]
    verbosity = {}
    for degrees in ANGLES:
        wanted = {"dpa": {"direction": direction_at(degrees)}, "rewards": {"preference": 1.0}}
        told = await flow.ask_all(questions, seed, wanted, n=DRAWS)
        verbosity[degrees] = _attribute(questions, told, 1)
        rows.append(_row(f"{degrees} degrees", degrees, questions, told))
        firm = await flow.ask_all(
            questions, seed, {"dpa": {"direction": direction_at(degrees)}}, temperature=0
        )
        rows.append(_row(f"{degrees} degrees, greedy", degrees, questions, firm))
    return rows, verbosity


def _row(
    name: str, degrees: int | None, questions: Sequence[str], responses: Sequence[Response]
) -> dict[str, Any]:
    row: dict[str, Any] = {"answer": name, "degrees": degrees}
    row["trained"] = degrees is not None and abs(degrees) <= TRAINED_DEGREES
    for i, attribute in enumerate(("helpfulness", "verbosity")):
        row[attribute], row[f"{attribute}_se"] = mean_se(_attribute(questions, responses, i))
    if degrees is not None:
        each = np.stack(
            [
                projected(questions, column, degrees)
                for column in zip(*texts(responses), strict=True)
            ]
        )
        row["projected"], row["projected_se"] = mean_se(each.mean(0))
    worth = np.stack([gold(questions, column) for column in zip(*texts(responses), strict=True)])
    row["gold"], row["gold_se"] = mean_se(worth.mean(0))
    row["tokens"] = tokens(responses) / len(responses[0].candidates)
    return row


def _attribute(questions: Sequence[str], responses: Sequence[Response], index: int) -> Array:
    """[P]: mean over the draws."""
    rows = zip(questions, texts(responses), strict=True)
    return np.array(
        [np.mean([attributes(question, text)[index] for text in drawn]) for question, drawn in rows]
    )


def steps(verbosity: dict[int, Array]) -> list[dict[str, Any]]:
    """From each angle to the next: how much verbosity rises, paired by question."""
    made = []
    for low, high in pairwise(ANGLES):
        rise, error = mean_se(verbosity[high] - verbosity[low])
        inside = max(abs(low), abs(high)) <= TRAINED_DEGREES
        made.append({"from": low, "to": high, "rise": rise, "rise_se": error, "trained": inside})
    return made


def verdicts(made: Sequence[dict[str, Any]]) -> list[str]:
    """Where the claim holds, in words."""
    said = []
    for inside, where in (
        (True, f"within the trained {TRAINED_DEGREES:g} degrees"),
        (False, "beyond them"),
    ):
        found = [step for step in made if step["trained"] is inside]
        rising = [step for step in found if step["rise"] > 2 * step["rise_se"]]
        falling = [step for step in found if step["rise"] < -2 * step["rise_se"]]
        word = "MONOTONE" if len(rising) == len(found) else "NOT MONOTONE"
        said.append(
            f"Verbosity over the angle {where}: {word}. Of {len(found)} steps {len(rising)} rise by more than two standard errors, "
            f"{len(falling)} fall: "
            + ", ".join(
                f"{s['from']} to {s['to']}: {s['rise']:+.2f} ± {s['rise_se']:.2f}" for s in found
            )
            + "."
        )
    return said


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table."""
    table = Table(
        "answer",
        "trained",
        "helpfulness",
        "verbosity",
        "v . r",
        "gold",
        "tokens",
        title="Mean of the answers, ± s.e.",
    )
    for row in rows:
        cells = [
            shown(row[name], row[f"{name}_se"]) if name in row else ""
            for name in ("helpfulness", "verbosity", "projected", "gold")
        ]
        table.add_row(
            row["answer"], "yes" if row["trained"] else "", *cells, f"{row['tokens']:.0f}"
        )
    OUT.print(table)


async def run(seed: int, n_prompts: int) -> None:
    """Ask, tabulate, judge, record."""
    OUT.print(__doc__)
    OUT.print(
        f"""{n_prompts} questions, {DRAWS} draws each at temperature 1 and one greedy; seed {seed}; standard errors over questions.
Helpfulness, verbosity and gold are exact, read from the text. Baseline: the same model asked without a direction.
The model's directed documents are rejection-sampled by exact v . r, at angles within {TRAINED_DEGREES:g} degrees, nine in ten
within 20. That selection also taught it to be right and polite whenever a direction is told: read the table along the angle.
""",
        highlight=False,
    )
    questions = world.prompts(n_prompts, seed)
    async with serving() as flow:
        rows, verbosity = await measure(flow, questions, seed)
    show(rows)
    made = steps(verbosity)
    said = verdicts(made)
    OUT.print("\n".join(said), highlight=False)
    setup: dict[str, Any] = {
        "prompts": n_prompts,
        "draws": DRAWS,
        "trained_degrees": TRAINED_DEGREES,
        "temperature": 1.0,
    }
    setup |= {"steps": made, "verdicts": said}
    OUT.print(
        f"written: {record('dpa', baseline='the same model without a direction, and greedy', seed=seed, rows=rows, setup=setup)}"
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=160)
    parser.add_argument("--seed", type=int, default=2024)
    options = parser.parse_args()
    asyncio.run(run(options.seed, options.prompts))


if __name__ == "__main__":
    main()
