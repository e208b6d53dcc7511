"""Robust preference selection on the embedded demo, against best-of-k at the target with the same budget.

The claim (2510.20498): where a model saw few examples of a direction, drawing from k directions near it and choosing by the
original one gives better answers than k draws from the direction itself; its theorem says the pool dominates.

    python benchmarks/alignment/rps.py
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.alignment.flow import OUT, Flow, mean_se, projected, serving, shown, tokens
from benchmarks.demo.direction import TRAINED_DEGREES, direction_at
from benchmarks.record import record
from infer_align.demo import world
from infer_align.flow.response import Response
from infer_align.objectives import project
from infer_align.types import Array

TARGETS = (-60, -45, -35, -20, 0, 20, 35, 45, 60)
K, MAX_ANGLE = 5, 30.0
BASELINE = "best of 5 at the target"
UNIFORM, PUBLISHED, CLAMPED, GREEDY = (
    "RPS, uniform",
    "RPS, the authors' grid",
    "best of 5, target clamped",
    "greedy at the target",
)
HOODS = {BASELINE: "none", UNIFORM: "uniform", PUBLISHED: "published"}


async def answers(
    flow: Flow, questions: Sequence[str], seed: int, degrees: int
) -> dict[str, tuple[list[str], float]]:
    """What each way answers, and the tokens it spends."""
    found = {}
    for name, hood in HOODS.items():
        responses = await flow.ask_all(questions, seed, _wanted(degrees, hood))
        found[name] = [response.returned[0].text for response in responses], tokens(responses)
    clamped = max(-TRAINED_DEGREES, min(TRAINED_DEGREES, degrees))
    responses = await flow.ask_all(questions, seed, _wanted(clamped, "none"))
    picked = await asyncio.gather(
        *(_pick(flow, q, r, degrees) for q, r in zip(questions, responses, strict=True))
    )
    found[CLAMPED] = list(picked), tokens(responses)
    firm = await flow.ask_all(
        questions, seed, {"dpa": {"direction": direction_at(degrees)}}, temperature=0
    )
    found[GREEDY] = [response.returned[0].text for response in firm], tokens(firm)
    return found


def _wanted(degrees: float, hood: str) -> Mapping[str, Any]:
    rps = {"k": K, "max_angle": MAX_ANGLE, "neighborhood": hood}
    return {"dpa": {"direction": direction_at(degrees)}, "rps": rps, "rewards": {"preference": 1.0}}


async def _pick(flow: Flow, question: str, response: Response, degrees: float) -> str:
    """The candidate that the served reward puts first along another direction than it was drawn for."""
    reward = flow.rewards["preference"]
    marks = await reward.score([{"role": "user", "content": question}], response.candidates)
    return response.candidates[
        int(project(direction_at(degrees), marks.values, reward.attributes).mean(0).argmax())
    ].text


def rows_of(
    questions: Sequence[str], degrees: int, found: Mapping[str, tuple[list[str], float]]
) -> list[dict[str, Any]]:
    """Exact v . r by the target, and the difference to the baseline, paired by question."""
    base = projected(questions, found[BASELINE][0], degrees)
    return [
        _row(degrees, name, projected(questions, texts, degrees), base, spent)
        for name, (texts, spent) in found.items()
    ]


def _row(degrees: int, name: str, values: Array, base: Array, spent: float) -> dict[str, Any]:
    mean, error = mean_se(values)
    gap, gap_error = mean_se(values - base)
    sign = np.sign(np.round(values - base, 9))
    shares = {word: float((sign == s).mean()) for word, s in (("win", 1), ("tie", 0), ("loss", -1))}
    row = {
        "target": degrees,
        "trained": abs(degrees) <= TRAINED_DEGREES,
        "answer": name,
        "projected": mean,
        "projected_se": error,
    }
    return row | {"minus_baseline": gap, "minus_baseline_se": gap_error, **shares, "tokens": spent}


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Where the claim holds, in words."""
    said = []
    for name in (UNIFORM, PUBLISHED, CLAMPED):
        for inside, where in ((False, "beyond the trained range"), (True, "inside it")):
            found = [row for row in rows if row["answer"] == name and row["trained"] is inside]
            better = [
                row["target"]
                for row in found
                if row["minus_baseline"] > 2 * row["minus_baseline_se"]
            ]
            worse = [
                row["target"]
                for row in found
                if row["minus_baseline"] < -2 * row["minus_baseline_se"]
            ]
            said.append(
                f"{name}, {where}: better at {better or 'none'}, worse at {worse or 'none'} of {len(found)} targets."
            )
    return said


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table."""
    heads = ("target", "trained", "answer", "v . r", "- best of 5", "win / tie / loss, %", "tokens")
    table = Table(
        *heads, title="Exact reward along the target, ± s.e.; bold: more than two standard errors"
    )
    for row in rows:
        shares = " / ".join(f"{100 * row[word]:.0f}" for word in ("win", "tie", "loss"))
        gap = (
            ""
            if row["answer"] == BASELINE
            else shown(row["minus_baseline"], row["minus_baseline_se"], sign=True)
        )
        cells = [
            row["answer"],
            shown(row["projected"], row["projected_se"]),
            gap,
            "" if row["answer"] == BASELINE else shares,
        ]
        table.add_row(
            str(row["target"]),
            "yes" if row["trained"] else "",
            *cells,
            f"{row['tokens']:.0f}",
            end_section=row["answer"] == GREEDY,
        )
    OUT.print(table)


async def run(seed: int, n_prompts: int) -> None:
    """Ask, tabulate, judge, record."""
    OUT.print(__doc__)
    OUT.print(
        f"""{n_prompts} questions, k = {K}, within {MAX_ANGLE:g} degrees, temperature 1; seed {seed}; standard errors over
questions, differences paired. Every way but greedy draws {K} answers and picks by one reward model (`preference`), along the
ORIGINAL target; what is compared is the exact v . r of the pick, which the reward model only estimates. Directions beyond
{TRAINED_DEGREES:g} degrees were never trained. "{CLAMPED}" is the honest control: whoever knows the trained range
can ask for its edge instead.
""",
        highlight=False,
    )
    questions, rows = world.prompts(n_prompts, seed), []
    async with serving() as flow:
        for degrees in TARGETS:
            rows += rows_of(questions, degrees, await answers(flow, questions, seed, degrees))
    show(rows)
    said = verdicts(rows)
    OUT.print("\n".join(said), highlight=False)
    setup = {
        "prompts": n_prompts,
        "k": K,
        "max_angle": MAX_ANGLE,
        "trained_degrees": TRAINED_DEGREES,
        "temperature": 1.0,
        "verdicts": said,
    }
    OUT.print(f"written: {record('rps', baseline=BASELINE, seed=seed, rows=rows, setup=setup)}")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=2024)
    options = parser.parse_args()
    asyncio.run(run(options.seed, options.prompts))


if __name__ == "__main__":
    main()
