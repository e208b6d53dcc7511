"""Measure the cost of log-probabilities of given texts, against generating the texts.

Each round generates 8 candidates of one prompt and then reads their texts after the same prompt.
Both times include the prompt, which is read once for all candidates.

    python benchmarks/serving/sequences.py [--rounds 7] [--only demo]
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from time import perf_counter, process_time
from typing import NamedTuple

from rich.console import Console

from benchmarks.serving.answers import WrongAnswerError, draw_candidates
from benchmarks.serving.cases import (
    Case,
    measure_cases,
    record_cases,
    started_engine,
    two_models,
)
from benchmarks.serving.rows import Row, print_rows, row
from infer_align.decoding.sequences import SequenceQuery
from infer_align.engines.transformers.engine import TransformersEngine
from infer_align.types import Draw

CANDIDATES = 8
QUESTION = {"role": "user", "content": "What are the diet and the colour of the owl?"}
TARGET = "at most 0.3"
OUT = Console()


CASES = two_models(64, 64)


class Cost(NamedTuple):
    """The cost of one run."""

    seconds: float
    cpu_seconds: float
    tokens: int


async def generate(engine: TransformersEngine, seed: int, tokens: int) -> tuple[Cost, list[str]]:
    """Generate the candidates; return the cost and their texts."""
    body = {"messages": [QUESTION], "max_tokens": tokens, "temperature": 0.7}
    seeds = tuple(seed * CANDIDATES + i for i in range(CANDIDATES))
    start, cpu = perf_counter(), process_time()
    candidates = await draw_candidates(engine, Draw(body, CANDIDATES, seeds), None)
    seconds, cpu_seconds = perf_counter() - start, process_time() - cpu
    generated = sum(candidate.completion_tokens for candidate in candidates)
    return Cost(seconds, cpu_seconds, generated), [candidate.text for candidate in candidates]


async def read(engine: TransformersEngine, texts: Sequence[str]) -> Cost:
    """Read the texts; return the cost."""
    start, cpu = perf_counter(), process_time()
    answer = await engine.sequence_logprobs(SequenceQuery({"messages": [QUESTION]}, tuple(texts)))
    cost = Cost(perf_counter() - start, process_time() - cpu, answer.text_tokens)
    if len(answer.sums) != len(texts) or not all(map(math.isfinite, answer.sums)):
        raise WrongAnswerError(f"the log-probabilities of {len(texts)} texts: {answer.sums}")
    return cost


async def measure(case: Case, rounds: int) -> list[Row]:
    """Return the rows of one model."""
    engine = await started_engine(case)
    generated: list[Cost] = []
    scored: list[Cost] = []
    # The first round warms up.
    for seed in range(rounds + 1):
        cost, texts = await generate(engine, seed, case.tokens)
        generated.append(cost)
        scored.append(await read(engine, texts))
    await engine.close()
    return [_row(case, scored[1:], generated[1:])]


def _row(case: Case, scored: list[Cost], generated: list[Cost]) -> Row:
    ours = statistics.median(cost.seconds for cost in scored)
    baseline = statistics.median(cost.seconds for cost in generated)
    cpu = statistics.median(cost.cpu_seconds for cost in scored)
    baseline_cpu = statistics.median(cost.cpu_seconds for cost in generated)
    what = f"{case.name}, {CANDIDATES} candidates of up to {case.tokens} tokens"
    return {
        **row(what, ours / baseline, 1e3 * ours, 1e3 * baseline, TARGET),
        "cpu_value": cpu / baseline_cpu,
        # A text may be split into other tokens than it was sampled from.
        "tokens": statistics.median(cost.tokens for cost in scored),
        "baseline_tokens": statistics.median(cost.tokens for cost in generated),
    }


def main() -> None:
    """Measure, print and record."""
    measured = measure_cases(__doc__, 7, CASES, measure)
    print_rows(measured.rows, OUT, ("cost", "ratio", "milliseconds", "generating", "target"))
    for item in measured.rows:
        OUT.print(f"{item['what']}: {item['cpu_value']:.2f} by CPU time")
    setup = {
        "candidates": CANDIDATES,
        "unit": "milliseconds for all candidates; median of the rounds",
        "note": "the machine ran other programs; compare figures of one row only",
    }
    baseline = "generating the same candidates, in alternating rounds"
    record_cases("sequences", measured, baseline, setup)


if __name__ == "__main__":
    main()
