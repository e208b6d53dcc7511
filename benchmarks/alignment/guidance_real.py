"""Guidance by prompts on a real small model: SmolLM2-135M-Instruct, as `make serve` serves it.

The claim (Sanchez et al., 2306.17806): a scale on the difference that a trait's prompt makes turns
the trait up and down, also beyond asking for it. Beside each measure of a trait stand guards: the
log-probability of the answer under the frozen model, and the share of distinct word pairs, which
fall when the text breaks.

    python benchmarks/alignment/guidance_real.py
    python benchmarks/alignment/guidance_real.py --pools answer_pools.jsonl.xz    # its instructions
    python benchmarks/alignment/guidance_real.py --upstream --prompts 24    # before an upstream

With --upstream, `vllm serve` has the model, and our server stands before it: it reads the most
likely tokens of each context from the upstream. The guards are read from the model itself.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import lzma
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from rich.table import Table

from benchmarks.alignment.flow import Flow, serving
from benchmarks.alignment.report import OUT, argument_parser, difference, mean_se, row_figure
from benchmarks.record import RESULTS, record
from benchmarks.serving.client import serving as serving_http
from infer_align.decoding.sequences import SequenceQuery
from infer_align.engines.transformers.engine import TransformersEngine
from infer_align.quickstart import CONFIG
from infer_align.quickstart.rewards import cheerfulness
from infer_align.types import Array

# Configured in the quickstart; a measure of each stands in MEASURES, or is the number of tokens.
TRAITS = ("cheerful", "simple", "brief")
SCALES = (-1.0, 0.0, 1.0, 2.0, 3.0)
# Scales of "cheerful" and "simple" together.
GRID = tuple(itertools.product((0.0, 1.0, 2.0), repeat=2))
# The scales before an upstream, where every token costs a call per context.
UPSTREAM_TRAIT = "cheerful"
UPSTREAM_SCALES = (-1.0, 0.0, 1.0, 2.0)
MODEL = "SmolLM2-135M-Instruct"
# `vllm serve` for a CPU. It keeps the prefixes of the contexts, so a call reads one token.
UPSTREAM = (
    *("-m", "vllm.entrypoints.launchers.api_server.entry", "--port", "{port}"),
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--block-size", "32"),
    *("--kv-cache-memory-bytes", str(1 << 30), "--max-logprobs", "64"),
    "--disable-uvicorn-access-log",
)
MAX_TOKENS = 48
TEMPERATURE = 0.8
SEED = 90_210
# Instructions for a run without a file.
TOPICS = (
    "rainbows", "the moon", "bread", "volcanoes", "chess", "honey bees", "trains", "the ocean",
    "friendship", "winter", "the heart", "paper", "music", "elections", "sleep", "glaciers",
)  # fmt: skip
TASKS = (
    "Tell me about {}.",
    "Write a short paragraph about {} for a newsletter.",
    "Why do people care about {}?",
    "Give me some advice that has to do with {}.",
)
_WORD = re.compile(r"[A-Za-z']+")
_VOWELS = re.compile(r"[aeiouy]+")


@dataclass(frozen=True, slots=True)
class Cell:
    """The answers to all prompts by one setting. Every array is [P]."""

    setting: Mapping[str, float]  # trait -> scale
    measures: Mapping[str, Array]


def cheerful(text: str) -> float:
    """Return the sentiment of a text by the lexicon VADER, from -1 to 1."""
    return cheerfulness([], text)


def reading_ease(text: str) -> float:
    """Return Flesch's reading ease of a text: 100 is easy, 0 is hard. Syllables are vowel groups.

    Source: Flesch, "A new readability yardstick" (1948).
    """
    words = _WORD.findall(text)
    if not words:
        return 0.0
    sentences = max(1, len(re.findall(r"[.!?]+", text)))
    syllables = sum(max(1, len(_VOWELS.findall(word.lower()))) for word in words)
    return 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)


def distinct_pairs(text: str) -> float:
    """Return the share of distinct pairs of neighbouring words; 1 for a text without pairs."""
    words = text.lower().split()
    pairs = [*itertools.pairwise(words)]
    return len({*pairs}) / len(pairs) if pairs else 1.0


# Trait -> the measure that should rise with its scale. Fewer tokens are better for "brief".
MEASURES: dict[str, Callable[[str], float]] = {"cheerful": cheerful, "simple": reading_ease}


def prompts(pools: Path | None, n: int) -> list[str]:
    """Return n instructions: of a file of answer pools, or of the list above."""
    if pools is None:
        made = [task.format(topic) for topic in TOPICS for task in TASKS]
        return made[:n]
    with lzma.open(pools, "rt") as lines:
        every = [json.loads(line)["prompt"] for line in lines]
    # Spread over the file, so that no single source fills the list.
    step = max(1, len(every) // n)
    return every[::step][:n]


async def answer(
    flow: Flow,
    questions: Sequence[str],
    seed: int,
    scales: dict[str, float],
    frozen: Flow | None = None,
) -> Cell:
    """Answer every question once with these scales, and measure the answers.

    Args:
        flow: answers the questions.
        questions: the prompts.
        seed: of the draws.
        scales: trait -> scale.
        frozen: reads the log-probabilities of the frozen model, if `flow` cannot.
    """
    guidance = {"guidance": {"scale": scales}, "rewards": {}}
    body = {"max_tokens": MAX_TOKENS, "temperature": TEMPERATURE}
    responses = await flow.ask_all(questions, seed, guidance, **body)
    texts = [response.returned[0].text for response in responses]
    measures: dict[str, list[float]] = {name: [] for name in MEASURES}
    for text in texts:
        for name, measure in MEASURES.items():
            measures[name].append(measure(text))
    measures["tokens"] = [float(each.returned[0].completion_tokens) for each in responses]
    measures["distinct_pairs"] = [distinct_pairs(text) for text in texts]
    measures["logprob_per_token"] = await frozen_logprobs(frozen or flow, questions, texts)
    arrays = {name: np.array(values) for name, values in measures.items()}
    return Cell(scales, arrays)


async def frozen_logprobs(
    flow: Flow, questions: Sequence[str], texts: Sequence[str]
) -> list[float]:
    """Return the mean log-probability per token of each answer under the frozen model."""
    means: list[float] = []
    for question, text in zip(questions, texts, strict=True):
        messages = [{"role": "user", "content": question}]
        read = await flow.engine.sequence_logprobs(SequenceQuery({"messages": messages}, (text,)))
        logprobs = read.logprobs[0]
        means.append(float(logprobs.mean()) if len(logprobs) else float("nan"))
    return means


def setting_key(scales: Mapping[str, float]) -> str:
    """Return a text that is equal for settings that draw the same answers."""
    active = [f"{trait} {scale:g}" for trait, scale in scales.items() if scale]
    return ", ".join(active) or "frozen"


def rows_of(cells: Sequence[Cell], frozen: Cell) -> list[dict[str, Any]]:
    """Return the recorded rows, with the differences to the frozen model paired by prompt."""
    rows: list[dict[str, Any]] = []
    for cell in cells:
        row: dict[str, Any] = {f"scale_{name}": scale for name, scale in cell.setting.items()}
        for name, values in cell.measures.items():
            valid = ~np.isnan(values) & ~np.isnan(frozen.measures[name])
            row[name], row[f"{name}_se"] = mean_se(values[valid])
            gap = values[valid] - frozen.measures[name][valid]
            row[f"{name}_minus_frozen"], row[f"{name}_minus_frozen_se"] = mean_se(gap)
        rows.append(row)
    return rows


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table. A difference in bold is more than two standard errors from zero."""
    measures = [*MEASURES, "tokens", "logprob_per_token", "distinct_pairs"]
    table = Table("scale", *measures, "cheerful - frozen", "simple - frozen", title=title)
    for row in rows:
        scales = [f"{key[6:]} {row[key]:g}" for key in row if key.startswith("scale_")]
        cells = [row_figure(row, name) for name in measures]
        for name in MEASURES:
            cells.append(difference(row[f"{name}_minus_frozen"], row[f"{name}_minus_frozen_se"]))
        table.add_row(", ".join(scales), *cells)
    OUT.print(table)


def plot(cells: Mapping[str, Sequence[Cell]]) -> None:
    """Plot the measure of each trait, and the frozen model's log-probability, against the scale."""
    mpl.use("Agg")
    plot_figure, axes = plt.subplots(1, len(TRAITS) + 1, figsize=(13, 3.6), layout="constrained")
    for axis, (trait, row) in zip(axes, cells.items(), strict=False):
        measure = trait if trait in MEASURES else "tokens"
        points = np.array([mean_se(cell.measures[measure]) for cell in row])
        axis.errorbar(SCALES, points[:, 0], points[:, 1], marker="o")
        axis.set(xlabel=f"scale of {trait!r}", title=f"{measure} (standard errors)")
        axis.axvline(1.0, color="0.7", linewidth=0.8)
        guard = np.array([np.nanmean(cell.measures["logprob_per_token"]) for cell in row])
        axes[-1].plot(SCALES, guard, marker="o", markersize=3, label=trait)
    axes[-1].set(xlabel="scale", title="log p per token, frozen model")
    axes[-1].legend(fontsize=7)
    plot_figure.savefig(RESULTS / "guidance_real.png", dpi=100)
    plt.close(plot_figure)


async def run(seed: int, questions: Sequence[str], source: str) -> None:
    """Answer the prompts with every scale, print the tables, record and plot the results."""
    OUT.print(__doc__, highlight=False)
    settings = [{trait: scale} for trait in TRAITS for scale in SCALES]
    pairs = [{"cheerful": first, "simple": second} for first, second in GRID]
    cells: dict[str, Cell] = {}
    async with serving(CONFIG) as flow:
        for scales in (*settings, *pairs):
            key = setting_key(scales)
            # A trait with scale 0 changes nothing, so that many settings are the same.
            if key not in cells:
                cells[key] = await answer(flow, questions, seed, scales)
                OUT.print(f"{key}: measured", highlight=False)
    by_trait: dict[str, list[Cell]] = {}
    for trait in TRAITS:
        row = [
            replace(cells[setting_key({trait: scale})], setting={trait: scale}) for scale in SCALES
        ]
        by_trait[trait] = row
    grid = [replace(cells[setting_key(scales)], setting=scales) for scales in pairs]
    frozen = by_trait["cheerful"][SCALES.index(0.0)]
    rows: list[dict[str, Any]] = []
    for trait, row in by_trait.items():
        rows += rows_of(row, frozen)
        show(f"Guidance by {trait!r}, one draw", rows_of(row, frozen))
    composed = rows_of(grid, frozen)
    show("Two traits at once", composed)
    setup = {
        "prompts": len(questions),
        "source": source,
        "max_tokens": MAX_TOKENS,
        "temperature": TEMPERATURE,
        "traits": [*TRAITS],
    }
    baseline = "the frozen model (scale 0) and asking (scale 1), with the same seeds"
    written = record(
        "guidance_real", baseline=baseline, seed=seed, rows=[*rows, *composed], setup=setup
    )
    OUT.print("written:", written)
    plot(by_trait)


def folder_of(flow: Flow) -> str:
    """Return the folder of the model that the embedded engine has loaded."""
    assert isinstance(flow.engine, TransformersEngine)
    return str(flow.engine.frozen.lm.config.name_or_path)


def before_upstream(model: str, port: int) -> AbstractAsyncContextManager[Flow]:
    """Start the same configuration before the server on this port, with the model's tokenizer."""
    url = f"http://127.0.0.1:{port}/v1"
    engine = f'engine={{urls="{url}", probe="start", model="{MODEL}", tokenizer="{model}"}}'
    return serving(CONFIG, [engine, "rewards={}", "server.default_rewards={}"])


async def run_upstream(seed: int, questions: Sequence[str], source: str) -> None:
    """Answer the prompts with every scale of one trait before an upstream; print and record."""
    OUT.print(__doc__, highlight=False)
    cells: list[Cell] = []
    async with serving(CONFIG) as frozen:
        model = folder_of(frozen)
        command = (*UPSTREAM, "--model", model, "--served-model-name", MODEL)
        with serving_http(*command, ready="/health", seconds=600) as (port, _):
            async with before_upstream(model, port) as flow:
                for scale in UPSTREAM_SCALES:
                    scales = {UPSTREAM_TRAIT: scale}
                    cells.append(await answer(flow, questions, seed, scales, frozen))
                    OUT.print(f"{UPSTREAM_TRAIT} {scale:g}: measured", highlight=False)
    rows = rows_of(cells, cells[UPSTREAM_SCALES.index(0.0)])
    show(f"Guidance by {UPSTREAM_TRAIT!r} before an upstream, one draw", rows)
    setup = {
        "prompts": len(questions),
        "source": source,
        "max_tokens": MAX_TOKENS,
        "temperature": TEMPERATURE,
        "traits": [UPSTREAM_TRAIT],
        "upstream": "the same model behind vllm serve on the same machine, in float32",
    }
    baseline = "the frozen model (scale 0) and asking (scale 1), with the same seeds"
    name = "guidance_upstream"
    written = record(name, baseline=baseline, seed=seed, rows=rows, setup=setup)
    OUT.print("written:", written)


def main() -> None:
    """Run from the command line."""
    parser = argument_parser(__doc__, prompts=64)
    parser.set_defaults(seed=SEED)
    parser.add_argument("--pools", type=Path, help="answer pools of AlpacaEval, JSONL in xz")
    parser.add_argument("--upstream", action="store_true", help="measure before an upstream")
    options = parser.parse_args()
    source = "a list of topics" if options.pools is None else "AlpacaEval's instructions"
    questions = prompts(options.pools, options.prompts)
    measure = run_upstream if options.upstream else run
    asyncio.run(measure(options.seed, questions, source))


if __name__ == "__main__":
    main()
