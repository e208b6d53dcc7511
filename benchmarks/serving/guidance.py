"""Measure the cost of guidance by prompts, in milliseconds per token.

The same requests are answered plainly, guided by one trait (two contexts) and by three traits (four
contexts), in alternating rounds of one run. Decoding is the time of a step in which all requests
run, from one forward pass to the next. The whole request includes the prompts of the contexts. The
engine has one thread, and CPU time counts: other programs on the machine do not change it much.

    python benchmarks/serving/guidance.py [--rounds 3] [--only demo]
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from itertools import pairwise
from time import perf_counter, process_time
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks.serving.answers import draw_candidates
from benchmarks.serving.cases import (
    Case,
    measure_cases,
    record_cases,
    started_engine,
    two_models,
)
from benchmarks.serving.rows import Row, print_rows, row
from infer_align.engines.transformers.engine import TransformersEngine
from infer_align.steering import Contrast, Guidance
from infer_align.types import Draw

BATCH = 16
SCALE = 1.5
MIN_P = 0.05
PROMPTS = (
    "You are cheerful and happy. Answer with joy.",
    "Use short and simple words that a child understands.",
    "Write in a formal and polite style, as in a letter.",
)
# Most that guidance may cost, as a multiple of plain decoding, by its number of traits.
TARGETS = {1: "at most 2.1", 3: "at most 4.2"}
OUT = Console()


CASES = two_models(96, 24)


class Cost(NamedTuple):
    """The cost of one run, or of one step of it."""

    seconds: float
    cpu_seconds: float


class StepClock:
    """Notes when the forward passes of a model begin."""

    def __init__(self, lm: Any) -> None:
        self.passes: list[tuple[int, int, Cost]] = []
        lm.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, args: Any, kwargs: Any) -> None:
        rows, tokens = kwargs["input_ids"].shape
        self.passes.append((rows, tokens, Cost(perf_counter(), process_time())))

    def steps(self, rows: int) -> list[Cost]:
        """Return the cost of each step of so many rows, and forget all passes."""
        passes, self.passes = self.passes, []
        steps: list[Cost] = []
        for (*shape, start), (*next_shape, end) in pairwise(passes):
            if shape == next_shape == [rows, 1]:
                seconds = end.seconds - start.seconds
                steps.append(Cost(seconds, end.cpu_seconds - start.cpu_seconds))
        return steps


def draw(number: int, tokens: int, traits: int) -> Draw:
    """Return one request of one candidate, guided by so many traits."""
    question = {"role": "user", "content": f"{number + 1}. Tell me about the owl."}
    body = {"messages": [question], "max_tokens": tokens, "ignore_eos": True}
    contrasts: list[Contrast] = []
    for i, prompt in enumerate(PROMPTS[:traits]):
        messages = [{"role": "system", "content": prompt}, question]
        contrasts.append(Contrast(f"trait {i}", SCALE, {**body, "messages": messages}))
    guidance = Guidance(tuple(contrasts), MIN_P) if contrasts else None
    return Draw(body, 1, (number,), guidance=guidance)


async def run(engine: TransformersEngine, tokens: int, traits: int) -> Cost:
    """Answer a batch of requests once and return the cost."""
    start, cpu = perf_counter(), process_time()
    draws = [draw(i, tokens, traits) for i in range(BATCH)]
    await asyncio.gather(*(draw_candidates(engine, item, tokens) for item in draws))
    return Cost(perf_counter() - start, process_time() - cpu)


async def measure(case: Case, rounds: int) -> list[Row]:
    """Return the rows of one model."""
    engine = await started_engine(case)
    whole: dict[int, list[Cost]] = {traits: [] for traits in (0, *TARGETS)}
    decoding: dict[int, list[Cost]] = {traits: [] for traits in (0, *TARGETS)}
    clock = StepClock(engine.frozen.lm)
    await run(engine, 2, 0)
    for _ in range(rounds):
        for traits, costs in whole.items():
            clock.passes.clear()
            costs.append(await run(engine, case.tokens, traits))
            decoding[traits] += clock.steps(BATCH * (1 + traits))
    await engine.close()
    rows: list[Row] = []
    for traits, target in TARGETS.items():
        what = f"{case.name}, traits: {traits}"
        rows.append(_row(f"{what}, decoding", decoding[traits], decoding[0], BATCH, target))
        answered = BATCH * case.tokens
        rows.append(_row(f"{what}, whole request", whole[traits], whole[0], answered, ""))
    return rows


def _row(what: str, ours: list[Cost], baseline: list[Cost], tokens: int, target: str) -> Row:
    def milliseconds(costs: Sequence[float]) -> float:
        return 1e3 * statistics.median(costs) / tokens

    guided = milliseconds([cost.cpu_seconds for cost in ours])
    plain = milliseconds([cost.cpu_seconds for cost in baseline])
    guided_wall = milliseconds([cost.seconds for cost in ours])
    plain_wall = milliseconds([cost.seconds for cost in baseline])
    return {
        **row(what, guided / plain, guided, plain, target),
        "wall_value": guided_wall / plain_wall,
        "wall_ms_per_token": guided_wall,
        "baseline_wall_ms_per_token": plain_wall,
    }


def main() -> None:
    """Measure, print and record."""
    measured = measure_cases(__doc__, 3, CASES, measure)
    print_rows(measured.rows, OUT, ("cost", "ratio", "ms per token", "plain", "target"))
    for item in measured.rows:
        OUT.print(f"{item['what']}: {item['wall_value']:.2f} by the clock")
    setup = {
        "batch": BATCH,
        "unit": "milliseconds of CPU time per token; median of the steps or rounds",
        "note": "one thread, so CPU time is the time on an idle machine; wall_* is by the clock",
    }
    baseline = "the same requests without guidance, in alternating rounds"
    record_cases("guidance_cost", measured, baseline, setup)


if __name__ == "__main__":
    main()
