"""What steering costs: tokens per second of the head and the lookahead value, against plain decoding and the published way.

The published procedure values the k candidates of every token with k + 1 passes of the value model, one after the other, one row at
a time; it is run here on the same models. All figures are from the same run, in alternating rounds.
    python benchmarks/serving/vas.py
"""

from __future__ import annotations

import asyncio
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import matplotlib

matplotlib.use("agg")
import torch
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table

from benchmarks.record import RESULTS, record
from infer_align import config
from infer_align.demo import world
from infer_align.engines.transformers import TransformersEngine
from infer_align.types import Candidate, Draw, Steering

ROUNDS = 7
TOKENS = 96
OUT = Console()
PLAIN, HEAD, LOOKAHEAD = "plain", "head", "lookahead"
VALUES = {PLAIN: None, HEAD: "helpful", LOOKAHEAD: "helpful-lookahead"}


def steering(way: str, k: int) -> Steering | None:
    """How a draw is steered, if it is."""
    value = VALUES[way]
    return None if value is None else Steering({value: 2.0}, k, "keep")


async def rate(engine: TransformersEngine, way: str, batch: int, k: int) -> float:
    """Tokens per second of `batch` concurrent requests."""
    body = {
        "messages": [{"role": "user", "content": world.prompts(1, seed=3)[0]}],
        "max_tokens": TOKENS,
        "ignore_eos": True,
    }
    started = perf_counter()
    await asyncio.gather(
        *(_finish(engine, Draw(body, 1, (i,), steering=steering(way, k))) for i in range(batch))
    )
    return batch * TOKENS / (perf_counter() - started)


async def _finish(engine: TransformersEngine, draw: Draw) -> None:
    async with engine.sample(draw) as stream:
        async for event in stream:
            if isinstance(event, Candidate) and event.error:
                raise RuntimeError(event.error)


@torch.inference_mode()
def published(engine: TransformersEngine, k: int, tokens: int = 12) -> float:
    """Tokens per second of the published procedure: batch 1, a pass for the prefix and one per candidate, one after the other."""
    model = engine.frozen
    value_lm = engine.value("helpful-lookahead").lm
    ids = model.render(
        Draw({"messages": [{"role": "user", "content": world.prompts(1, seed=3)[0]}]})
    ).ids
    started = perf_counter()
    for _ in range(tokens):
        logits = model.lm(input_ids=torch.tensor([ids])).logits[0, -1]
        _values_of(value_lm, ids)
        top = logits.topk(k).indices.tolist()
        values = torch.tensor([_values_of(value_lm, [*ids, token]) for token in top])
        logits[top] += 2.0 * (values - values.mean())
        ids = [*ids, int(torch.softmax(logits, -1).multinomial(1))]
    return tokens / (perf_counter() - started)


def _values_of(value_lm: Any, ids: list[int]) -> float:
    positions = torch.arange(len(ids))[None]
    return float(value_lm.forward(torch.tensor([ids]), None, positions, None)[0, -1, 0])


async def measure() -> tuple[list[dict[str, Any]], dict[str, dict[Any, list[float]]]]:
    """The figures that have an aim, and the cost over batch and over k."""
    engine = config.load(None, ["engine.threads=1"]).load_engine()
    assert isinstance(engine, TransformersEngine)
    await engine.start()
    found: dict[tuple[str, int, int], list[float]] = {}
    paper: list[float] = []
    cases = [(batch, 20) for batch in (1, 4, 16, 64)] + [(16, k) for k in (5, 10, 40, 64)]
    for _ in range(ROUNDS):
        for batch, k in cases:
            for way in VALUES:
                found.setdefault((way, batch, k), []).append(await rate(engine, way, batch, k))
        paper.append(published(engine, 20))
    await engine.close()
    best = {case: statistics.median(rates) for case, rates in found.items()}
    one = statistics.median(paper)
    rows = [
        _row(
            "head, batch 16, against plain decoding",
            best[HEAD, 16, 20],
            best[PLAIN, 16, 20],
            "at least 0.8",
        ),
        _row(
            "lookahead, batch 1, against the published procedure", best[LOOKAHEAD, 1, 20], one, ""
        ),
        _row(
            "lookahead, batch 16, against the published procedure",
            best[LOOKAHEAD, 16, 20],
            one,
            "at least 8",
        ),
        _row(
            "lookahead, batch 16, against plain decoding",
            best[LOOKAHEAD, 16, 20],
            best[PLAIN, 16, 20],
            "",
        ),
    ]
    curves = {way: {f"batch {b}, k {k}": best[way, b, k] for b, k in cases} for way in VALUES}
    _plot(best)
    return rows, curves  # type: ignore[return-value]


def _row(what: str, ours: float, baseline: float, target: str) -> dict[str, Any]:
    return {
        "what": what,
        "value": ours / baseline,
        "ours": ours,
        "baseline": baseline,
        "target": target,
    }


def _plot(best: dict[tuple[str, int, int], float]) -> Path:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for way in VALUES:
        batches, ks = (1, 4, 16, 64), (5, 10, 20, 40, 64)
        left.plot(batches, [best[way, b, 20] for b in batches], marker="o", label=way)
        right.plot(ks, [best[way, 16, k] for k in ks], marker="o", label=way)
    left.set(xscale="log", xlabel="concurrent requests, k = 20", ylabel="tokens per second")
    right.set(xlabel="k, 16 concurrent requests", ylabel="tokens per second", ylim=(0, None))
    left.legend()
    figure.suptitle("What steering costs, one CPU thread, embedded demo")
    figure.tight_layout()
    path = RESULTS / "vas_speed.png"
    figure.savefig(path, dpi=100)
    return path


def main() -> None:
    """Measure, print, record."""
    rows, curves = asyncio.run(measure())
    table = Table("tokens per second", "ratio", "ours", "baseline", "aim")
    for row in rows:
        table.add_row(
            row["what"],
            *(f"{row[key]:.4g}" for key in ("value", "ours", "baseline")),
            row["target"],
        )
    OUT.print(table)
    setup = {"rounds": ROUNDS, "tokens": TOKENS, "tokens_per_second": curves}
    OUT.print(
        "written:",
        record(
            "vas_speed",
            baseline="plain decoding; the published procedure",
            seed=0,
            rows=rows,
            setup=setup,
        ),
    )


if __name__ == "__main__":
    main()
