r"""Every method on real language: SmolLM2-135M-Instruct, at equal cost and with guards.

Two traits have an exact measure: cheerful answers (the lexicon VADER) and easy answers (Flesch's
reading ease). Each method is asked for more of one trait. Its effect is the paired difference to
one plain draw, on the same prompts. Cost is the number of tokens that the model reads or writes for
an answer, and CPU time. The guards fall when the text breaks: log-probability of the answer under
the frozen model, and the share of distinct word pairs.

A fitted value and a fitted reward are made beforehand, on other prompts (docs/vas.md and
docs/fit-reward.md); without them, their rows are left out.

    python benchmarks/alignment/real.py --pools answer_pools.jsonl.xz \
        --value cheerful=sentiment.safetensors --reward cheerful=ensemble.safetensors
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from rich.table import Table

from benchmarks.alignment.flow import Flow, serving
from benchmarks.alignment.guidance_real import (
    cheerful,
    distinct_pairs,
    frozen_logprobs,
    prompts,
    reading_ease,
)
from benchmarks.alignment.report import OUT, argument_parser, difference, mean_se, row_figure
from benchmarks.record import RESULTS, record
from infer_align.flow.response import Response
from infer_align.quickstart import CONFIG
from infer_align.types import Array

# More than any file has.
ALL = 100_000
MAX_TOKENS = 40
TEMPERATURE = 0.8
SEED = 31_415
MEASURES: dict[str, Callable[[str], float]] = {"cheerful": cheerful, "simple": reading_ease}
# Rewards that need no training, by trait. Each reads the prompt of the trait's guidance.
FREE_REWARDS = ('rewards.ratio_{trait}={{kind="density_ratio",per_token=true,prompt="{prompt}"}}',)
GUARDS = ("tokens", "cost", "cpu_ms", "logprob_per_token", "distinct_pairs")


@dataclass(frozen=True, slots=True)
class Method:
    """One way to answer.

    Attributes:
        name: for the table.
        align: the request's `align`.
        body: further fields of the request.
        system: a system message that asks for the trait.
    """

    name: str
    align: Mapping[str, Any] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """The answers of one method to all prompts. Every array of the measures is [P]."""

    method: Method
    measures: Mapping[str, Array]
    text: str  # the first answer


def methods(trait: str, prompt: str, betas: Sequence[float], *, fitted: bool) -> list[Method]:
    """Return the methods of one trait, plain decoding first.

    Args:
        trait: the configured trait.
        prompt: of the trait.
        betas: of the fitted value, or none.
        fitted: True if there is a fitted reward.
    """
    ratio = {f"ratio_{trait}": 1.0}
    listed = [
        Method("one sample", {"rewards": {}}),
        Method("greedy", {"rewards": {}}, {"temperature": 0}),
        Method("asking in the system message", {"rewards": {}}, {}, prompt),
    ]
    for scale in (1.0, 2.0):
        listed.append(Method(f"guidance {scale:g}", {**_guided(trait, scale), "rewards": {}}))
    for beta in betas:
        listed.append(Method(f"vas {beta:g}", {**_valued(trait, beta), "rewards": {}}))
    for n in (2, 4):
        best = {"best_of_n": {"n": n}}
        listed.append(Method(f"best of {n}, density ratio", {**best, "rewards": ratio}))
        if fitted:
            by_fitted = {**best, "rewards": {f"fitted_{trait}": 1.0}}
            listed.append(Method(f"best of {n}, fitted reward", by_fitted))
    best_of_2 = {"best_of_n": {"n": 2}, "rewards": ratio}
    listed.append(Method("guidance 2, best of 2", {**_guided(trait, 2.0), **best_of_2}))
    if betas and fitted:
        best_of_4 = {"best_of_n": {"n": 4}, "rewards": {f"fitted_{trait}": 1.0}}
        steered = {**_valued(trait, betas[0]), **best_of_4}
        listed.append(Method(f"vas {betas[0]:g}, best of 4, fitted reward", steered))
    return listed


def _guided(trait: str, scale: float) -> dict[str, Any]:
    return {"guidance": {"scale": {trait: scale}}}


def _valued(trait: str, beta: float) -> dict[str, Any]:
    return {"vas": {"beta": {trait: beta}}}


async def answer(flow: Flow, method: Method, questions: Sequence[str], trait: str) -> Cell:
    """Answer every question by one method and measure the answers."""
    fields: dict[str, Any] = {"max_tokens": MAX_TOKENS, "temperature": TEMPERATURE, **method.body}
    started = process_time()
    responses = await _ask_all(flow, method, questions, fields)
    seconds = process_time() - started
    texts = [response.returned[0].text for response in responses]
    count = len(texts)
    costs = [_cost(response) for response in responses]
    tokens = [float(response.returned[0].completion_tokens) for response in responses]
    measures = {
        "gold": np.array([MEASURES[trait](text) for text in texts]),
        "tokens": np.array(tokens),
        "cost": np.array(costs),
        "cpu_ms": np.full(count, 1e3 * seconds / count),
        "logprob_per_token": np.array(await frozen_logprobs(flow, questions, texts)),
        "distinct_pairs": np.array([distinct_pairs(text) for text in texts]),
    }
    return Cell(method, measures, texts[0])


async def _ask_all(
    flow: Flow, method: Method, questions: Sequence[str], fields: dict[str, Any]
) -> list[Response]:
    if method.system is None:
        return await flow.ask_all(questions, SEED, method.align, **fields)
    calls = []
    for index, question in enumerate(questions):
        messages = [
            {"role": "system", "content": method.system},
            {"role": "user", "content": question},
        ]
        seed = SEED * 1_000_003 + index
        body = {**fields, "messages": messages}
        calls.append(flow.ask(question, seed, method.align, **body))
    return await asyncio.gather(*calls)


def _cost(response: Response) -> float:
    """Return the number of tokens that the model generated or read for one answer.

    Every method reads the prompt of the plain request. It is not counted.
    """
    read = response.context_tokens + response.scores.usage.reward_tokens
    generated = sum(candidate.completion_tokens for candidate in response.candidates)
    return float(generated + read)


def rows_of(trait: str, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return the recorded rows, with the differences to one plain draw paired by prompt."""
    plain = cells[0].measures["gold"]
    rows: list[dict[str, Any]] = []
    for cell in cells:
        row: dict[str, Any] = {"trait": trait, "method": cell.method.name}
        for name, values in cell.measures.items():
            valid = values[~np.isnan(values)]
            row[name], row[f"{name}_se"] = mean_se(valid)
        gap = cell.measures["gold"] - plain
        row["effect"], row["effect_se"] = mean_se(gap)
        row["text"] = cell.text
        rows.append(row)
    return rows


def show(trait: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table. An effect in bold is more than two standard errors from zero."""
    table = Table("method", trait, "effect", *GUARDS, title=f"More {trait!r}")
    for row in rows:
        effect = difference(row["effect"], row["effect_se"])
        cells = [row_figure(row, "gold"), effect]
        for name in GUARDS:
            cells.append(f"{row[name]:.2f}")
        table.add_row(row["method"], *cells)
    OUT.print(table)


def plot(rows: Sequence[Mapping[str, Any]]) -> None:
    """Plot effect, cost and guard of each method. The methods are listed once for each trait."""
    mpl.use("Agg")
    traits = [*dict.fromkeys(row["trait"] for row in rows)]
    plot_figure, axes = plt.subplots(
        len(traits),
        3,
        figsize=(12, 4.4 * len(traits)),
        sharey="row",
        layout="constrained",
        squeeze=False,
    )
    for (effect, cost, guard), trait in zip(axes, traits, strict=True):
        listed = [row for row in rows if row["trait"] == trait]
        names = [row["method"] for row in listed]
        errors = [2 * row["effect_se"] for row in listed]
        effect.errorbar([row["effect"] for row in listed], names, xerr=errors, fmt="o")
        effect.axvline(0, color="grey", linewidth=1)
        effect.invert_yaxis()
        effect.set(title=f"More {trait!r}", xlabel="gain over one sample, ± 2 standard errors")
        cost.barh(names, [row["cost"] for row in listed], color="tab:gray")
        cost.set(title="Cost", xlabel="tokens read or written for an answer")
        guard.plot([row["logprob_per_token"] for row in listed], names, "s", color="tab:green")
        guard.set(title="Guard", xlabel="log p per token under the frozen model")
        for axis in (effect, cost, guard):
            axis.grid(axis="y", alpha=0.3)
    plot_figure.savefig(RESULTS / "real.png", dpi=100)
    plt.close(plot_figure)


async def run(options: argparse.Namespace) -> None:
    """Measure every method for both traits; print, record and plot."""
    OUT.print(__doc__, highlight=False)
    questions = test_prompts(options.pools, options.exclude, options.prompts)
    values: dict[str, str] = dict(text.split("=", 1) for text in options.value)
    fitted: dict[str, str] = dict(text.split("=", 1) for text in options.reward)
    betas = {name: [*map(float, text.split(","))] for name, text in _pairs(options.beta)}
    traits = config_traits()
    settings = ["engine.threads=1", "server.default_rewards={}"]
    for trait in MEASURES:
        for reward in FREE_REWARDS:
            settings.append(reward.format(trait=trait, prompt=traits[trait]))
    for trait, path in values.items():
        settings.append(f'values.{trait}={{kind="head",path="{path}"}}')
    for trait, path in fitted.items():
        settings.append(f'rewards.fitted_{trait}={{kind="embedding",path="{path}"}}')
    rows: list[dict[str, Any]] = []
    async with serving(CONFIG, settings) as flow:
        for trait in MEASURES:
            listed = methods(trait, traits[trait], betas.get(trait, []), fitted=trait in fitted)
            cells: list[Cell] = []
            for method in listed:
                cells.append(await answer(flow, method, questions, trait))
                OUT.print(f"{trait}, {method.name}: measured", highlight=False)
            rows += rows_of(trait, cells)
            show(trait, rows[-len(cells) :])
            # A run of two traits takes long: the first is not lost if the second is stopped.
            save(rows, len(questions))


def save(rows: list[dict[str, Any]], count: int) -> None:
    """Record and plot the rows of some traits, measured on `count` prompts."""
    setup = {
        "prompts": count,
        "max_tokens": MAX_TOKENS,
        "temperature": TEMPERATURE,
        "cost": "tokens generated, read as context of guidance, and read by rewards",
    }
    baseline = "one plain draw of the same prompt and seed"
    OUT.print("written:", record("real", baseline=baseline, seed=SEED, rows=rows, setup=setup))
    plot(rows)


def test_prompts(pools: Path | None, exclude: Path | None, count: int) -> list[str]:
    """Return instructions that no fit has read.

    Args:
        pools: the file of instructions.
        exclude: the prompts of the fits, as `infer-align fit value --prompts` reads them.
        count: number of instructions.
    """
    known = set() if exclude is None else {*exclude.read_text().splitlines()}
    every = prompts(pools, ALL)
    return [prompt for prompt in every if json.dumps(prompt) not in known][:count]


def config_traits() -> dict[str, str]:
    """Return the prompts of the configured traits."""
    sections = tomllib.loads(CONFIG.read_text())["traits"]
    return {name: section["prompt"] for name, section in sections.items()}


def _pairs(texts: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, value) for name, _, value in (text.partition("=") for text in texts)]


def main() -> None:
    """Run from the command line."""
    parser = argument_parser(__doc__, prompts=48)
    parser.add_argument("--plot", action="store_true", help="draw the recorded figures again")
    parser.add_argument("--pools", type=Path, help="answer pools of AlpacaEval, JSONL in xz")
    parser.add_argument("--exclude", type=Path, help="JSONL file of the prompts of the fits")
    parser.add_argument("--value", action="append", default=[], metavar="TRAIT=FILE")
    parser.add_argument("--beta", action="append", default=[], metavar="TRAIT=BETA,...")
    parser.add_argument("--reward", action="append", default=[], metavar="TRAIT=FILE")
    options = parser.parse_args()
    if options.plot:
        plot(json.loads((RESULTS / "real.json").read_text())["rows"])
        return
    asyncio.run(run(options))


if __name__ == "__main__":
    main()
