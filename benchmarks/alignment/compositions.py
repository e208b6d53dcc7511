"""Methods together on the embedded demo: a combination against its parts.

Is it better than they are, for the same number of answers?

DPA + VAS         a direction told to the model, and every token steered by a value
RPS + UWO         neighbouring directions, chosen by the target's reward and by an ensemble with its uncertainty
judge + ensemble  the served model's own judgement beside the five reward models

python benchmarks/alignment/compositions.py
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.alignment.flow import (
    OUT,
    Flow,
    attributes,
    chosen,
    gold,
    mean_se,
    projected,
    serving,
    shown,
    tokens,
)
from benchmarks.demo.direction import direction_at
from benchmarks.record import record
from infer_align.demo import world
from infer_align.types import Array

BRIEF, HELPFUL = {"brief": 4.0}, {"helpful": 4.0}
JUDGE = {"mode": "score", "scale": 100}
QUALITY_WEIGHT = 0.5  # of the ensemble beside v . r, and of the judge beside the ensemble: their spreads are alike then
N = 8
PARTS = {
    "DPA + VAS helpful": ("DPA at 10", "VAS helpful"),
    "DPA + VAS brief": ("DPA at 10", "VAS brief"),
    "RPS + UWO": ("RPS", "best of 5 + UWO", "RPS + mean"),
    f"best of {N}, judge + ensemble": (f"best of {N}, ensemble", f"best of {N}, judge"),
}


def requests() -> dict[str, dict[str, tuple[Mapping[str, Any] | None, float | None]]]:
    """Section -> answer -> (its `align`, the angle it is measured along)."""
    told = {"direction": direction_at(10)}
    robust = {"dpa": {"direction": direction_at(45)}, "rps": {"k": 5}}
    same = {**robust, "rps": {"k": 5, "neighborhood": "none"}}
    alone, both = {"preference": 1.0}, {"preference": 1.0, "quality": QUALITY_WEIGHT}
    draws = {"best_of_n": {"n": N}}
    return {
        "DPA + VAS": {
            "DPA at 10": ({"dpa": told}, 10),
            "VAS helpful": ({"vas": {"beta": HELPFUL}}, 10),
            "VAS brief": ({"vas": {"beta": BRIEF}}, 10),
            "DPA + VAS helpful": ({"dpa": told, "vas": {"beta": HELPFUL}}, 10),
            "DPA + VAS brief": ({"dpa": told, "vas": {"beta": BRIEF}}, 10),
        },
        "RPS + UWO": {
            "best of 5 at 45": ({**same, "rewards": alone}, 45),
            "best of 5 + UWO": ({**same, "rewards": both, "ensemble": {"objective": "uwo"}}, 45),
            "RPS": ({**robust, "rewards": alone}, 45),
            "RPS + mean": ({**robust, "rewards": both, "ensemble": {"objective": "mean"}}, 45),
            "RPS + UWO": ({**robust, "rewards": both, "ensemble": {"objective": "uwo"}}, 45),
        },
        "judge + ensemble": {
            f"best of {N}, ensemble": ({**draws, "rewards": {"quality": 1.0}}, None),
            f"best of {N}, judge": ({**draws, "rewards": {}, "trust_judge": JUDGE}, None),
            f"best of {N}, pairwise judge": (
                {**draws, "rewards": {}, "trust_judge": {"mode": "pairwise"}},
                None,
            ),
            f"best of {N}, judge + ensemble": (
                {**draws, "rewards": {"quality": QUALITY_WEIGHT}, "trust_judge": JUDGE},
                None,
            ),
        },
    }


async def measure(
    flow: Flow, questions: Sequence[str], seed: int
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Array]]]:
    """One row for each way to answer, and what it was measured by on each question: answer -> measure -> [P]."""
    rows, found = [], {}
    plain: dict[str, dict[str, Any]] = {"one sample": {}, "greedy": {"temperature": 0}}
    for name, body in plain.items():
        responses = await flow.ask_all(questions, seed, None, **body)
        rows.append(_row("", name, questions, chosen(responses), tokens(responses)))
    for section, asked in requests().items():
        for name, (wanted, degrees) in asked.items():
            responses = await flow.ask_all(questions, seed, wanted)
            answers = chosen(responses)
            found[name] = {"gold": gold(questions, answers)}
            row = _row(section, name, questions, answers, tokens(responses))
            if degrees is not None:
                found[name]["v . r"] = projected(questions, answers, degrees)
                row["projected"], row["projected_se"] = mean_se(found[name]["v . r"])
            rows.append(row)
    return rows, found


def _row(
    section: str, name: str, questions: Sequence[str], answers: Sequence[str], spent: float
) -> dict[str, Any]:
    row: dict[str, Any] = {"section": section, "answer": name, "tokens": spent}
    row["gold"], row["gold_se"] = mean_se(gold(questions, answers))
    rewards = np.array([attributes(*pair) for pair in zip(questions, answers, strict=True)])
    row["verbosity"], row["verbosity_se"] = mean_se(rewards[:, 1])
    return row


def verdicts(found: Mapping[str, Mapping[str, Array]]) -> list[str]:
    """Each combination against each of its parts, in every measure, paired by question."""
    said = []
    for name, parts in PARTS.items():
        for part in parts:
            gaps = []
            for measured, values in found[name].items():
                gap, error = mean_se(values - found[part][measured])
                word = (
                    "better" if gap > 2 * error else "worse" if gap < -2 * error else "no different"
                )
                gaps.append(f"{word} in {measured} ({gap:+.2f} ± {error:.2f})")
            said.append(f"{name} against {part}: {', '.join(gaps)}.")
    return said


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table."""
    table = Table("", "answer", "gold", "v . r", "verbosity", "tokens", title="Means ± s.e.")
    for i, row in enumerate(rows):
        cells = [
            shown(row[name], row[f"{name}_se"]) if name in row else ""
            for name in ("gold", "projected", "verbosity")
        ]
        last = i + 1 == len(rows) or rows[i + 1]["section"] != row["section"]
        table.add_row(
            row["section"], row["answer"], *cells, f"{row['tokens']:.0f}", end_section=last
        )
    OUT.print(table)


async def run(seed: int, n_prompts: int) -> None:
    """Ask, tabulate, judge, record."""
    OUT.print(__doc__)
    OUT.print(
        f"""{n_prompts} questions, temperature 1, seed {seed}; standard errors over questions; a combination is compared with each
of its parts, which draw as many answers, paired by question. Gold, v . r (at 10 and at 45 degrees) and verbosity are exact.
VAS: helpful {HELPFUL["helpful"]:g}, brief {BRIEF["brief"]:g}. Weight of the ensemble beside v . r, and beside the
judge (1 to 5): {QUALITY_WEIGHT}. The weights were set once and not tuned.
""",
        highlight=False,
    )
    questions = world.prompts(n_prompts, seed)
    async with serving() as flow:
        rows, found = await measure(flow, questions, seed)
    show(rows)
    said = verdicts(found)
    OUT.print("\n".join(said), highlight=False)
    setup = {
        "prompts": n_prompts,
        "temperature": 1.0,
        "quality_weight": QUALITY_WEIGHT,
        "verdicts": said,
    }
    OUT.print(
        f"written: {record('compositions', baseline='the parts of each combination', seed=seed, rows=rows, setup=setup)}"
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=2024)
    options = parser.parse_args()
    asyncio.run(run(options.seed, options.prompts))


if __name__ == "__main__":
    main()
