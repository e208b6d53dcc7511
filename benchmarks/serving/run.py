"""Serving, measured: overhead, best-of-n against plain n, throughput against `generate`, memory under cancellation.

Every figure stands beside a baseline of the same run, in alternating rounds; medians and ratios, as machines are noisy.
    python benchmarks/serving/run.py [overhead] [best_of_n] [throughput] [memory]
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from benchmarks.serving.client import Connection, closed_loop, serving
from infer_align.demo import world
from infer_align.engines.transformers import Transformers, TransformersEngine
from infer_align.types import Candidate, Draw

SERVER = ("-m", "infer_align_server", "serve")
FAKE = (
    *SERVER,
    "--set",
    "engine.kind=fake",
    "--set",
    "engine.model=demo",
    "--set",
    "server.port={port}",
)
DEMO = (*SERVER, "--set", "server.port={port}")
ROUNDS = 7
OUT = Console()


def overhead(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """The whole server over an instant engine, against that engine behind a bare route."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "a question of some length, as people ask them"}],
    }
    p50: dict[str, list[float]] = {"bare": [], "ours": []}
    rate: dict[str, list[float]] = {"bare": [], "ours": []}
    with serving("benchmarks/serving/bare.py", "{port}") as (bare, _), serving(*FAKE) as (ours, _):
        ports = {"bare": bare, "ours": ours}
        for port in ports.values():
            asyncio.run(closed_loop(port, body, 16, 400))
        for _ in range(rounds):
            for name, port in ports.items():
                latencies, _ = asyncio.run(closed_loop(port, body, 1, 200))
                p50[name].append(statistics.median(latencies) * 1e3)
                _, seconds = asyncio.run(closed_loop(port, body, 16, 600))
                rate[name].append(600 / seconds)
    ms = {name: statistics.median(values) for name, values in p50.items()}
    rps = {name: statistics.median(values) for name, values in rate.items()}
    return [
        row(
            "added p50 at concurrency 1, ms",
            ms["ours"] - ms["bare"],
            ms["ours"],
            ms["bare"],
            "at most 5",
        ),
        row(
            "requests per second at concurrency 16, ratio",
            rps["ours"] / rps["bare"],
            rps["ours"],
            rps["bare"],
            "at least 0.5",
        ),
    ]


def best_of_n(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Best-of-8 with five reward models, against one plain n=8 generation of the same tokens."""
    question = world.prompts(1, seed=7)[0]
    plain = {
        "model": "demo",
        "messages": [{"role": "user", "content": question}],
        "n": 8,
        "seed": 1,
        "max_tokens": 64,
    }
    body = {**plain, "n": 1, "align": {"best_of_n": {"n": 8}, "rewards": {"quality": 1}}}
    seconds: dict[str, list[float]] = {"plain": [], "best": []}
    with serving(*DEMO) as (port, _):
        for repeat in range(rounds * 8):
            for name, request in (("plain", plain), ("best", body)):
                latencies, _ = asyncio.run(closed_loop(port, {**request, "seed": repeat}, 1, 1))
                seconds[name] += latencies
    best, base = statistics.median(seconds["best"]), statistics.median(seconds["plain"])
    return [
        row(
            "best-of-8 against n=8, wall time ratio",
            best / base,
            best * 1e3,
            base * 1e3,
            "at most 1.3",
        )
    ]


def throughput(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """16 concurrent requests through the engine's continuous batching, against `generate` on a static batch of 16."""

    async def ours(engine: TransformersEngine, ids: list[int]) -> int:
        text = engine.frozen.tokenizer.decode(ids)
        draws = [
            Draw({"prompt": text, "max_tokens": 128, "ignore_eos": True}, 1, (i,), "completion")
            for i in range(16)
        ]
        return sum(await asyncio.gather(*(_tokens(engine, draw) for draw in draws)))

    async def measure() -> tuple[list[float], list[float]]:
        engine = Transformers(threads=1).load()
        await engine.start()
        model = engine.frozen
        ids = model.tokenizer(world.prompts(1, seed=3)[0])["input_ids"]
        batch = torch.tensor([ids] * 16)
        rates: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            started = perf_counter()
            tokens = await ours(engine, ids)
            rates[0].append(tokens / (perf_counter() - started))
            started = perf_counter()
            model.lm.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                do_sample=True,
                max_new_tokens=128,
                min_new_tokens=128,
            )
            rates[1].append(16 * 128 / (perf_counter() - started))
        await engine.close()
        return rates

    mine, generate = (statistics.median(rates) for rates in asyncio.run(measure()))
    return [
        row(
            "decode tokens per second of 16 requests, ratio",
            mine / generate,
            mine,
            generate,
            "at least 0.8",
        )
    ]


async def _tokens(engine: TransformersEngine, draw: Draw) -> int:
    async with engine.sample(draw) as stream:
        return sum(
            [event.completion_tokens async for event in stream if isinstance(event, Candidate)]
        )


def memory() -> list[dict[str, Any]]:
    """2,000 best-of-4 requests, every second one abandoned on the way, after as many to warm up: resident memory."""
    question = world.prompts(1, seed=7)[0]
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": question}],
        "align": {"best_of_n": {"n": 4}},
    }

    async def load(port: int, process: psutil.Process) -> list[float]:
        resident = []
        for done in range(0, 4001, 20):
            if done % 500 == 0:
                resident.append(process.memory_info().rss / 2**20)
            await asyncio.gather(*(_request(port, body, abandon=bool(i % 2)) for i in range(20)))
        return resident

    with serving(*DEMO) as (port, pid):
        resident = asyncio.run(load(port, psutil.Process(pid)))
    growth = row(
        "resident memory, MiB: growth over 2,000 requests",
        resident[-1] - resident[4],
        resident[-1],
        resident[4],
        "flat",
    )
    return [{**growth, "every_500_requests": resident}]


async def _request(port: int, body: dict[str, Any], *, abandon: bool) -> None:
    connection = Connection(port)
    request = connection.post("/v1/chat/completions", json.dumps(body).encode())
    try:
        await asyncio.wait_for(request, 0.03 if abandon else 60)
    except TimeoutError:
        assert abandon, "a request that was not abandoned took over a minute"
    connection.close()


def row(what: str, value: float, ours: float, baseline: float, target: str) -> dict[str, Any]:
    """One figure, what it is made of, and what was hoped for."""
    return {"what": what, "value": value, "ours": ours, "baseline": baseline, "target": target}


BENCHMARKS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "overhead": overhead,
    "best_of_n": best_of_n,
    "throughput": throughput,
    "memory": memory,
}


def main(names: list[str]) -> None:
    """Run those named, or all."""
    rows = [found for name in names or BENCHMARKS for found in BENCHMARKS[name]()]
    table = Table("what", "value", "ours", "baseline", "target")
    for found in rows:
        table.add_row(
            found["what"],
            *(f"{found[key]:.4g}" for key in ("value", "ours", "baseline")),
            found["target"],
        )
    OUT.print(table)
    if not names:
        baseline = "bare FastAPI route; one n=8 request; transformers generate; resident memory after 2,000 requests to warm up"
        OUT.print(
            "written:",
            record("serving", baseline=baseline, seed=0, rows=rows, setup={"rounds": ROUNDS}),
            highlight=False,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
