"""Measure serving.

The benchmarks are the overhead of the server, best-of-n against plain n, throughput against
`generate`, and memory under cancellation. Every figure has a baseline of the same run, in
alternating rounds; figures are medians and ratios, since machines are noisy.

    python benchmarks/serving/run.py [overhead] [best_of_n] [throughput] [memory]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import psutil
import torch
from rich.console import Console

from benchmarks.record import record
from benchmarks.serving.answers import WrongAnswerError, check_completions, draw_candidates
from benchmarks.serving.client import DEMO, Connection, closed_loop, serving
from benchmarks.serving.overhead import CONCURRENCY, compare_overhead
from benchmarks.serving.rows import Row, print_rows, row
from infer_align.demo import world
from infer_align.engines.transformers import Transformers
from infer_align.engines.transformers.engine import TransformersEngine
from infer_align.types import Draw

FAKE = (*DEMO, "--set", "engine.kind=fake", "--set", "engine.model=demo")
ROUNDS = 7
# Tokens of each request of the throughput benchmark.
TOKENS = 128
# Requests of the memory benchmark after the warm-up, and between two readings.
MEMORY_REQUESTS = 2000
READING_REQUESTS = 500
ABANDON_SECONDS = 0.03
OUT = Console()


def overhead(rounds: int = ROUNDS) -> list[Row]:
    """Compare the whole server over an instant engine with that engine behind a bare route."""
    question = "a question of some length, as people ask them"
    body = {"model": "demo", "messages": [{"role": "user", "content": question}]}
    with (
        serving("benchmarks/serving/bare.py", "{port}") as (bare_port, _),
        serving(*FAKE) as (our_port, _),
    ):
        return compare_overhead(
            {"bare": bare_port, "ours": our_port},
            closed_loop,
            body,
            rounds=rounds,
            requests=600,
            warmup=400,
            rate_target="at least 0.5",
        )


def best_of_n(rounds: int = ROUNDS) -> list[Row]:
    """Compare best-of-8 by five reward models with one n=8 generation of the same tokens."""
    plain = _demo_body(n=8, seed=1, max_tokens=64)
    align = {"best_of_n": {"n": 8}, "rewards": {"quality": 1}}
    bodies = {"plain": plain, "best": {**plain, "n": 1, "align": align}}
    seconds: dict[str, list[float]] = {"plain": [], "best": []}
    with serving(*DEMO) as (port, _):
        for seed in range(rounds * 8):
            for name, body in bodies.items():
                latencies, _ = asyncio.run(closed_loop(port, {**body, "seed": seed}, 1, 1))
                seconds[name] += latencies
    best = statistics.median(seconds["best"])
    baseline = statistics.median(seconds["plain"])
    return [
        row(
            "best-of-8 against n=8, wall time ratio",
            best / baseline,
            best * 1e3,
            baseline * 1e3,
            "at most 1.3",
        )
    ]


def throughput(rounds: int = ROUNDS) -> list[Row]:
    """Compare 16 concurrent requests to the engine with `generate` on a static batch of 16."""
    our_rates, generate_rates = asyncio.run(_measure_throughput(rounds))
    ours = statistics.median(our_rates)
    generate = statistics.median(generate_rates)
    return [
        row(
            "decode tokens per second of 16 requests, ratio",
            ours / generate,
            ours,
            generate,
            "at least 0.8",
        )
    ]


async def _measure_throughput(rounds: int) -> tuple[list[float], list[float]]:
    """Return the tokens per second of the engine and of `generate`, for each round."""
    engine = Transformers(threads=1).load()
    await engine.start()
    model = engine.frozen
    ids = model.tokenizer(world.prompts(1, seed=3)[0])["input_ids"]
    text = model.tokenizer.decode(ids)
    batch = torch.tensor([ids] * CONCURRENCY)
    our_rates = []
    generate_rates = []
    for _ in range(rounds):
        started = perf_counter()
        tokens = await _decode(engine, text)
        our_rates.append(tokens / (perf_counter() - started))
        started = perf_counter()
        output = model.lm.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=True,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
        )
        generate_rates.append(CONCURRENCY * TOKENS / (perf_counter() - started))
        if output.shape != (CONCURRENCY, len(ids) + TOKENS):
            raise WrongAnswerError(f"the output of generate has the shape {tuple(output.shape)}")
    await engine.close()
    return our_rates, generate_rates


async def _decode(engine: TransformersEngine, prompt: str) -> int:
    """Decode concurrent requests, and return the number of tokens."""
    body = {"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True}
    draws = [Draw(body, 1, (seed,), "completion") for seed in range(CONCURRENCY)]
    await asyncio.gather(*(draw_candidates(engine, draw, TOKENS) for draw in draws))
    return CONCURRENCY * TOKENS


def memory() -> list[Row]:
    """Measure the growth of resident memory over 2,000 best-of-4 requests after a warm-up.

    The client abandons every second request.
    """
    body = _demo_body(align={"best_of_n": {"n": 4}})
    with serving(*DEMO) as (port, process_id):
        readings = asyncio.run(_read_memory(port, psutil.Process(process_id), body))
    warm = readings[MEMORY_REQUESTS // READING_REQUESTS]
    growth = row(
        "resident memory, MiB: growth over 2,000 requests",
        readings[-1] - warm,
        readings[-1],
        warm,
        "flat",
    )
    return [{**growth, "every_500_requests": readings}]


async def _read_memory(port: int, process: psutil.Process, body: dict[str, Any]) -> list[float]:
    """Send the requests; return the memory in MiB after every 500 of them."""
    group = 20
    readings = []
    for sent in range(0, 2 * MEMORY_REQUESTS + 1, group):
        if sent % READING_REQUESTS == 0:
            readings.append(process.memory_info().rss / 2**20)
        requests = [_request(port, body, abandon=bool(i % 2)) for i in range(group)]
        await asyncio.gather(*requests)
    return readings


async def _request(port: int, body: dict[str, Any], *, abandon: bool) -> None:
    connection = Connection(port)
    request = connection.post("/v1/chat/completions", json.dumps(body).encode())
    try:
        answer = await asyncio.wait_for(request, ABANDON_SECONDS if abandon else 60)
        check_completions(body, [answer])
    except TimeoutError:
        assert abandon, "a request that was not abandoned took over a minute"
    connection.close()


def _demo_body(**fields: Any) -> dict[str, Any]:
    question = world.prompts(1, seed=7)[0]
    return {"model": "demo", "messages": [{"role": "user", "content": question}], **fields}


BENCHMARKS: dict[str, Callable[[], list[Row]]] = {
    "overhead": overhead,
    "best_of_n": best_of_n,
    "throughput": throughput,
    "memory": memory,
}


def main() -> None:
    """Run the named benchmarks, or all of them; write the result of all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="BENCHMARK", help=f"any of {', '.join(BENCHMARKS)}"
    )
    names = parser.parse_args().names
    for name in names:
        if name not in BENCHMARKS:
            parser.error(f"{name!r} is not a benchmark; must be one of {', '.join(BENCHMARKS)}")
    rows = []
    for name in names or BENCHMARKS:
        rows += BENCHMARKS[name]()
    print_rows(rows, OUT)
    if not names:
        path = record(
            "serving",
            baseline="bare FastAPI route; one n=8 request; transformers generate; "
            "resident memory after 2,000 requests to warm up",
            seed=0,
            rows=rows,
            setup={"rounds": ROUNDS},
        )
        OUT.print("written:", path, highlight=False)


if __name__ == "__main__":
    main()
