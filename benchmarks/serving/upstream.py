"""Measure what our server adds in front of an upstream.

The baseline is the bare upstream in the same run, in alternating rounds. Two clients send the load:
OpenAI's SDK, which is common, and a minimal one, which hides nothing of what our server adds.

    python benchmarks/serving/upstream.py [REQUESTS]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from openai import AsyncOpenAI
from rich.console import Console

from benchmarks.record import record
from benchmarks.serving.answers import check_completions
from benchmarks.serving.client import closed_loop, serving
from benchmarks.serving.overhead import CONCURRENCY, Ports, compare_overhead
from benchmarks.serving.rows import Row, print_rows, row

ROUNDS = 7
# Requests of a round.
REQUESTS = 600
OUT = Console()
MESSAGES: Any = [{"role": "user", "content": "a question of some length, as people ask them"}]
CONFIG = """
[server]
log_level = "error"
[engine]
kind = "openai"
urls = ["http://127.0.0.1:{port}/v1"]
[rewards.short]
kind = "rules"
words_weight = -1.0
[rewards.judge]
kind = "upstream"
urls = "http://127.0.0.1:{port}"
"""


async def sdk_closed_loop(
    port: int, body: dict[str, Any], concurrency: int, requests: int
) -> tuple[list[float], float]:
    """Send requests with OpenAI's SDK; like `closed_loop` otherwise."""
    fields = {key: value for key, value in body.items() if key != "align"}
    extra = {"align": body["align"]} if "align" in body else None
    remaining = iter(range(requests))
    latencies = []
    completions = []
    url = f"http://127.0.0.1:{port}/v1"
    async with AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:

        async def worker() -> None:
            for _ in remaining:
                started = perf_counter()
                completion = await client.chat.completions.create(**fields, extra_body=extra)
                latencies.append(perf_counter() - started)
                completions.append(completion)

        started = perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        seconds = perf_counter() - started
    check_completions(body, [completion.model_dump() for completion in completions])
    return latencies, seconds


def best_of_8(ports: Ports, requests: int) -> list[Row]:
    """Compare best-of-8 with one call for n=8: scored by rules, and judged by a slow upstream."""
    plain = {"model": "instant", "messages": MESSAGES, "n": 8}
    scored = {**plain, "n": 1, "align": _best_of_8("short")}
    medians: dict[str, list[float]] = {"ours": [], "bare": []}
    for _ in range(ROUNDS):
        for name, body in (("bare", plain), ("ours", scored)):
            latencies, _ = asyncio.run(closed_loop(ports[name], body, 1, max(1, requests // 6)))
            medians[name].append(statistics.median(latencies) * 1e3)
    ours = statistics.median(medians["ours"])
    bare = statistics.median(medians["bare"])
    slow = {**plain, "model": "slow-2.0"}
    judged_seconds = _median_seconds(ports["ours"], {**slow, "n": 1, "align": _best_of_8("judge")})
    slow_seconds = _median_seconds(ports["bare"], slow)
    return [
        row("best-of-8 over one n=8 call, ms", ours - bare, ours, bare, "at most 10"),
        row(
            "best-of-8 on a 2 s upstream with 8 judge calls of 0.1 s, s",
            judged_seconds,
            judged_seconds,
            slow_seconds,
            "at most 2.2",
        ),
    ]


def _best_of_8(reward: str) -> dict[str, Any]:
    return {"best_of_n": {"n": 8}, "rewards": {reward: 1}}


def _median_seconds(port: int, body: dict[str, Any]) -> float:
    """Return the median latency of three requests, one after the other."""
    return statistics.median([asyncio.run(closed_loop(port, body, 1, 1))[1] for _ in range(3)])


@contextmanager
def servers() -> Iterator[Ports]:
    """Run the bare upstream and our server in front of it."""
    upstream = ("benchmarks/serving/instant.py", "{port}")
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(*upstream, ready="/v1/models") as (bare, _),
    ):
        config = Path(folder) / "infer-align.toml"
        config.write_text(CONFIG.format(port=bare))
        command = ("-m", "infer_align_server", "serve", str(config), "--set", "server.port={port}")
        with serving(*command) as (ours, _):
            yield {"bare": bare, "ours": ours}


def main() -> None:
    """Measure and print; write the result of a run with the usual number of requests."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "requests",
        nargs="?",
        type=int,
        help=f"requests of a round; default: {REQUESTS}, and the result is written",
    )
    given_requests = parser.parse_args().requests
    requests = given_requests or REQUESTS
    body = {"model": "instant", "messages": MESSAGES}
    load = {"rounds": ROUNDS, "requests": requests, "warmup": requests}
    with servers() as ports:
        rows = [
            *compare_overhead(
                ports,
                sdk_closed_loop,
                body,
                **load,
                rate_target="at least 0.8",
                label=" (OpenAI SDK)",
            ),
            *compare_overhead(
                ports, closed_loop, body, **load, rate_target="", label=" (minimal client)"
            ),
            *best_of_8(ports, requests),
        ]
    print_rows(rows, OUT)
    if given_requests is None:
        setup = {
            "rounds": ROUNDS,
            "requests": requests,
            "concurrency": CONCURRENCY,
            "no_seed": "replies are scripted: nothing is drawn",
        }
        path = record("upstream", baseline="the bare upstream", seed=None, rows=rows, setup=setup)
        OUT.print("written:", path, highlight=False)


if __name__ == "__main__":
    main()
