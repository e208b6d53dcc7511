"""Measure how fast the small model of `make serve` decodes on this CPU.

The embedded engine and the `generate` of transformers decode the same prompts to the same number of
tokens, in alternating rounds. "plain" is as many requests as the batch has rows, each with its own
prompt. "best of 8" is one request with eight candidates, which share its prompt.

    python benchmarks/serving/small_model.py [--rounds 5] [--tokens 32]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Awaitable, Callable
from time import perf_counter, process_time
from typing import Any, NamedTuple

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.record import record
from benchmarks.serving.answers import WrongAnswerError, draw_candidates
from benchmarks.serving.rows import Row, print_rows, ratio_row
from infer_align import config, quickstart
from infer_align.engines.transformers.engine import TransformersEngine
from infer_align.types import Draw

# By type of the engine: that of the baseline. `generate` has no int8 weights.
BASELINES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "bfloat16"}
BATCHES = (1, 8, 32)
CANDIDATES = 8
TEMPERATURE = 0.8
TOPICS = ("the sea", "a city in winter", "the history of bread", "how bees live")
OUT = Console()


class Cost(NamedTuple):
    """The cost of one run."""

    seconds: float
    cpu_seconds: float


def prompts(batch: int) -> list[list[dict[str, str]]]:
    """Return one conversation per row."""
    return [
        [{"role": "user", "content": f"{i + 1}. Tell me about {TOPICS[i % len(TOPICS)]}."}]
        for i in range(batch)
    ]


async def timed(run: Callable[[], Awaitable[object]]) -> Cost:
    """Run once and return the cost."""
    start, cpu = perf_counter(), process_time()
    await run()
    return Cost(perf_counter() - start, process_time() - cpu)


async def decode(engine: TransformersEngine, batch: int, candidates: int, tokens: int) -> None:
    """Decode with the embedded engine."""
    requests = []
    for i, messages in enumerate(prompts(batch)):
        body = {
            "messages": messages,
            "max_tokens": tokens,
            "temperature": TEMPERATURE,
            "ignore_eos": True,
        }
        seeds = tuple(range(i, i + candidates))
        draw = Draw(body, n=candidates, seeds=seeds)
        requests.append(draw_candidates(engine, draw, tokens))
    await asyncio.gather(*requests)


async def generate(lm: Any, tokenizer: Any, batch: int, candidates: int, tokens: int) -> None:
    """Decode with transformers: the same prompts, left-padded."""
    inputs = tokenizer.apply_chat_template(
        prompts(batch),
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
        padding=True,
    )
    output = lm.generate(
        **inputs,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        num_return_sequences=candidates,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
    )
    if output.shape != (batch * candidates, inputs["input_ids"].shape[1] + tokens):
        raise WrongAnswerError(f"the output of generate has the shape {tuple(output.shape)}")


async def measure(dtype: str, rounds: int, tokens: int) -> list[Row]:
    """Return the rows of one type of weights."""
    engine = config.load(quickstart.CONFIG, [f"engine.dtype={dtype}"]).load_engine()
    await engine.start()
    assert isinstance(engine, TransformersEngine)
    folder = engine.frozen.lm.config.name_or_path
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=BASELINES[dtype]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    cases = [(f"plain, batch {batch}", batch, 1) for batch in BATCHES]
    cases.append((f"best of {CANDIDATES}, one request", 1, CANDIDATES))
    rows = []
    for name, batch, candidates in cases:
        ours: list[Cost] = []
        baseline: list[Cost] = []
        for _ in range(rounds):
            ours.append(await timed(lambda b=batch, c=candidates: decode(engine, b, c, tokens)))
            baseline.append(
                await timed(lambda b=batch, c=candidates: generate(lm, tokenizer, b, c, tokens))
            )
        rows.append(_row(f"{name}, {dtype}", batch * candidates * tokens, ours, baseline))
        OUT.print(f"[dim]{rows[-1]}[/]")
    await engine.close()
    return rows


def _row(what: str, tokens: int, ours: list[Cost], baseline: list[Cost]) -> Row:
    def rate(costs: list[Cost]) -> float:
        return tokens / statistics.median(cost.seconds for cost in costs)

    def cpu_milliseconds(costs: list[Cost]) -> float:
        return 1e3 * statistics.median(cost.cpu_seconds for cost in costs) / tokens

    return {
        **ratio_row(what, rate(ours), rate(baseline), ""),
        "cpu_ms_per_token": cpu_milliseconds(ours),
        "baseline_cpu_ms_per_token": cpu_milliseconds(baseline),
    }


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    rows = []
    for dtype in BASELINES:
        rows += asyncio.run(measure(dtype, options.rounds, options.tokens))
    print_rows(rows, OUT)
    setup = {
        "rounds": options.rounds,
        "tokens": options.tokens,
        "threads": torch.get_num_threads(),
        "unit": "tokens per second, all candidates together; median of the rounds",
        "note": "the machine ran other programs; compare figures of one row only",
    }
    path = record(
        "small_model",
        baseline="transformers' generate on the same prompts, in alternating rounds",
        seed=0,
        rows=rows,
        setup=setup,
    )
    OUT.print(f"wrote {path}")


if __name__ == "__main__":
    main()
