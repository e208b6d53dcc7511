"""Rewards without a reward model on the embedded demo, beside its trained reward models.

    python benchmarks/alignment/free_rewards.py

Candidates of the frozen model are drawn once per prompt, and each selector picks among the same
ones. Gold of the best of n is the unbiased estimate over all subsets of n candidates.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from rich.table import Table

from benchmarks.alignment.flow import Flow, gold, serving, texts
from benchmarks.alignment.report import OUT, argument_parser, figure, mean_se
from benchmarks.demo.direction import direction_at
from benchmarks.record import record
from infer_align.demo.world import prompts
from infer_align.flow.stand_in import NEGATIVE_PROMPT, PROMPT
from infer_align.methods.best_of_n import expected_best
from infer_align.methods.dpa import Prompting
from infer_align.objectives import uwo
from infer_align.rewards import Reward
from infer_align.rewards.agreement import Agreement
from infer_align.rewards.density_ratio import DensityRatio
from infer_align.types import Array, Candidate

DEGREES = -20.0
UNCERTAINTY_WEIGHT = 0.5
SIZES = (1, 8, 64)
# Another seed than the one that training and the other pages use.
SEED = 31_337


def selectors(flow: Flow) -> dict[str, Reward]:
    """Return each reward that needs no reward model, by its name in the table."""
    sentence = flow.config.methods.get(Prompting).sentence(direction_at(DEGREES))
    sections = {
        "density_ratio, direction of -20 degrees": DensityRatio(prompt=sentence),
        "the same, per token": DensityRatio(prompt=sentence, per_token=True),
        "density_ratio, the default's prompts": DensityRatio(
            PROMPT, NEGATIVE_PROMPT, per_token=True
        ),
    }
    rewards: dict[str, Reward] = {}
    for name, section in sections.items():
        reward = section.load()
        reward.engines = {"served": flow.engine}
        rewards[name] = reward
    rewards["agreement by words"] = Agreement(by="words").load()
    return rewards


async def measure(n_prompts: int, n: int, seed: int) -> dict[str, dict[int, Array]]:
    """Return the gold [P] of the best of each number of candidates, by selector."""
    async with serving() as flow:
        questions = prompts(n_prompts, seed)
        responses = await flow.ask_all(questions, seed, temperature=1.0, n=n)
        pools = texts(responses)
        scores: dict[str, list[Array]] = {}
        quality = flow.rewards["quality"]
        named = {**selectors(flow), "UWO of five trained reward models": quality}
        for name, reward in named.items():
            scores[name] = []
            for question, pool in zip(questions, pools, strict=True):
                members = await _score(reward, question, pool)
                is_ensemble = len(members) > 1
                chosen = uwo(members, UNCERTAINTY_WEIGHT) if is_ensemble else members[0]
                scores[name].append(chosen)
            OUT.print(f"scored: {name}")
    values = [gold([question] * n, pool) for question, pool in zip(questions, pools, strict=True)]
    scores["oracle"] = values
    return {name: _curve(each, values) for name, each in scores.items()}


async def _score(reward: Reward, question: str, pool: Sequence[str]) -> Array:
    messages = [{"role": "user", "content": question}]
    candidates: list[Candidate] = []
    for index, text in enumerate(pool):
        candidates.append(Candidate(index, {"message": {"role": "assistant", "content": text}}))
    scored = await reward.score(messages, candidates)
    return np.asarray(scored.values[0])


def _curve(scores: Sequence[Array], values: Sequence[Array]) -> dict[int, Array]:
    curve: dict[int, Array] = {}
    for n in SIZES:
        best = [expected_best(*pair, n) for pair in zip(scores, values, strict=True)]
        curve[n] = np.array(best)
    return curve


def print_table(curves: Mapping[str, Mapping[int, Array]], write: Callable[[Table], None]) -> None:
    """Print the gold of the best of n, with standard errors over the prompts."""
    table = Table("selector", *(f"n = {n}" for n in SIZES))
    for name, curve in curves.items():
        table.add_row(name, *(figure(*mean_se(curve[n])) for n in SIZES))
    write(table)


def main() -> None:
    """Measure, print and record."""
    parser = argument_parser(__doc__, prompts=64)
    parser.add_argument("--candidates", type=int, default=64)
    parser.set_defaults(seed=SEED)
    options = parser.parse_args()
    curves = asyncio.run(measure(options.prompts, options.candidates, options.seed))
    print_table(curves, OUT.print)
    rows = []
    for name, curve in curves.items():
        row: dict[str, object] = {"selector": name}
        for n in SIZES:
            row[f"gold_{n}"], row[f"gold_{n}_se"] = mean_se(curve[n])
        rows.append(row)
    record(
        "free_rewards",
        baseline="UWO of the five shipped reward models on the same candidates",
        seed=options.seed,
        rows=rows,
        setup={"prompts": options.prompts, "candidates": options.candidates, "degrees": DEGREES},
    )


if __name__ == "__main__":
    main()
