"""Measure the cost of steering, in tokens per second.

Steering by the head and by the lookahead value is compared with plain decoding and with the
published procedure. That procedure values the k candidates of every token with k + 1 passes of the
value model, one after the other and one row at a time; here it runs on the same models. All figures
are from the same run, in alternating rounds.

    python benchmarks/serving/vas.py
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import torch
from matplotlib import pyplot as plt
from rich.console import Console

from benchmarks.record import RESULTS, record
from benchmarks.serving.answers import draw_candidates
from benchmarks.serving.rows import Row, print_rows, ratio_row
from infer_align import config
from infer_align.demo import world
from infer_align.engines.transformers.engine import TransformersEngine
from infer_align.steering import Steering
from infer_align.types import Draw

ROUNDS = 7
TOKENS = 96
TOP_K = 20
BETA = 2.0
# Tokens of the published procedure, which is slow.
PUBLISHED_TOKENS = 12
OUT = Console()
PLAIN, HEAD, LOOKAHEAD = "plain", "head", "lookahead"
# Value that steers, by the name of the curve.
VALUES = {PLAIN: None, HEAD: "helpful", LOOKAHEAD: "helpful-lookahead"}
BATCHES = (1, 4, 16, 64)
# Values of k at batch 16, in addition to TOP_K.
OTHER_TOP_KS = (5, 10, 40, 64)
CASES = [*((batch, TOP_K) for batch in BATCHES), *((16, k) for k in OTHER_TOP_KS)]
# Tokens per second by curve, batch and k.
Rates = dict[tuple[str, int, int], float]


async def start_engine() -> TransformersEngine:
    """Start the embedded demo's engine on one thread."""
    engine = config.load(None, ["engine.threads=1"]).load_engine()
    assert isinstance(engine, TransformersEngine)
    await engine.start()
    return engine


def steering(name: str, k: int) -> Steering | None:
    """Return the steering of a curve; None for plain decoding."""
    value = VALUES[name]
    return None if value is None else Steering({value: BETA}, k, "keep")


async def rate(engine: TransformersEngine, name: str, batch: int, k: int) -> float:
    """Return the tokens per second of `batch` concurrent requests."""
    body = {"messages": _messages(), "max_tokens": TOKENS, "ignore_eos": True}
    draws = [Draw(body, 1, (seed,), steering=steering(name, k)) for seed in range(batch)]
    started = perf_counter()
    await asyncio.gather(*(draw_candidates(engine, draw, TOKENS) for draw in draws))
    return batch * TOKENS / (perf_counter() - started)


def _messages() -> list[dict[str, str]]:
    return [{"role": "user", "content": world.prompts(1, seed=3)[0]}]


@torch.inference_mode()
def published_rate(engine: TransformersEngine, k: int, tokens: int = PUBLISHED_TOKENS) -> float:
    """Return the tokens per second of the published procedure at batch 1.

    It runs one pass for the prefix and one per candidate, one after the other.
    """
    model = engine.frozen
    value_model = engine.value("helpful-lookahead").lm
    ids = model.render(Draw({"messages": _messages()})).ids
    started = perf_counter()
    for _ in range(tokens):
        logits = model.lm(input_ids=torch.tensor([ids])).logits[0, -1]
        _value(value_model, ids)
        top = logits.topk(k).indices.tolist()
        values = torch.tensor([_value(value_model, [*ids, token]) for token in top])
        logits[top] += BETA * (values - values.mean())
        ids = [*ids, int(torch.softmax(logits, -1).multinomial(1))]
    return tokens / (perf_counter() - started)


def _value(value_model: Any, ids: list[int]) -> float:
    positions = torch.arange(len(ids))[None]
    return float(value_model.forward(torch.tensor([ids]), None, positions, None)[0, -1, 0])


async def measure() -> tuple[Rates, float]:
    """Return the median rate of each case, and of the published procedure."""
    engine = await start_engine()
    rates: dict[tuple[str, int, int], list[float]] = {}
    published = []
    for _ in range(ROUNDS):
        for batch, k in CASES:
            for name in VALUES:
                tokens_per_second = await rate(engine, name, batch, k)
                rates.setdefault((name, batch, k), []).append(tokens_per_second)
        published.append(published_rate(engine, TOP_K))
    await engine.close()
    medians = {case: statistics.median(values) for case, values in rates.items()}
    return medians, statistics.median(published)


def summarize(rates: Rates, published: float) -> list[Row]:
    """Return the figures that have a target."""
    return [
        ratio_row(
            "head, batch 16, against plain decoding",
            rates[HEAD, 16, TOP_K],
            rates[PLAIN, 16, TOP_K],
            "at least 0.8",
        ),
        ratio_row(
            "lookahead, batch 1, against the published procedure",
            rates[LOOKAHEAD, 1, TOP_K],
            published,
            "",
        ),
        ratio_row(
            "lookahead, batch 16, against the published procedure",
            rates[LOOKAHEAD, 16, TOP_K],
            published,
            "at least 8",
        ),
        ratio_row(
            "lookahead, batch 16, against plain decoding",
            rates[LOOKAHEAD, 16, TOP_K],
            rates[PLAIN, 16, TOP_K],
            "",
        ),
    ]


def plot(rates: Rates) -> Path:
    """Draw the rates over batch and over k, and return the file."""
    figure, (batch_axes, k_axes) = plt.subplots(1, 2, figsize=(10, 4))
    top_ks = sorted((TOP_K, *OTHER_TOP_KS))
    for name in VALUES:
        by_batch = [rates[name, batch, TOP_K] for batch in BATCHES]
        batch_axes.plot(BATCHES, by_batch, marker="o", label=name)
        by_k = [rates[name, 16, k] for k in top_ks]
        k_axes.plot(top_ks, by_k, marker="o", label=name)
    batch_axes.set(xscale="log", xlabel="concurrent requests, k = 20", ylabel="tokens per second")
    k_axes.set(xlabel="k, 16 concurrent requests", ylabel="tokens per second", ylim=(0, None))
    batch_axes.legend()
    figure.suptitle("Cost of steering, one CPU thread, embedded demo")
    figure.tight_layout()
    path = RESULTS / "vas_speed.png"
    figure.savefig(path, dpi=100)
    return path


def main() -> None:
    """Measure, plot, print and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    rates, published = asyncio.run(measure())
    rows = summarize(rates, published)
    plot(rates)
    print_rows(rows, OUT, ("tokens per second", "ratio", "ours", "baseline", "target"))
    curves: dict[str, dict[str, float]] = {name: {} for name in VALUES}
    for (name, batch, k), tokens_per_second in rates.items():
        curves[name][f"batch {batch}, k {k}"] = tokens_per_second
    path = record(
        "vas_speed",
        baseline="plain decoding; the published procedure",
        seed=0,
        rows=rows,
        setup={"rounds": ROUNDS, "tokens": TOKENS, "tokens_per_second": curves},
    )
    OUT.print("written:", path)


if __name__ == "__main__":
    main()
