"""In front of an upstream: what our server adds to it, against the bare upstream in the same run, in alternating rounds.

The load comes from two clients: OpenAI's SDK, which is what people have, and a minimal one, which hides nothing of what we add.
    python benchmarks/serving/upstream.py [requests of a round]
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from benchmarks.serving.client import closed_loop, serving

ROUNDS = 7
CONCURRENCY = 16
OUT = Console()
MESSAGES: Any = [{"role": "user", "content": "a question of some length, as people ask them"}]
CONFIG = """
[server]
log_level = "error"
[engine]
kind = "openai"
urls = ["http://127.0.0.1:{up}/v1"]
[rewards.short]
kind = "rules"
words_weight = -1.0
[rewards.judge]
kind = "upstream"
urls = "http://127.0.0.1:{up}"
"""
Load = Callable[[int, dict[str, Any], int, int], Awaitable[tuple[list[float], float]]]


async def by_sdk(
    port: int, body: dict[str, Any], concurrency: int, requests: int
) -> tuple[list[float], float]:
    """`closed_loop`, by OpenAI's SDK."""
    fields = {key: value for key, value in body.items() if key != "align"}
    extra = {"align": body["align"]} if "align" in body else None
    left, latencies = iter(range(requests)), []
    async with AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0
    ) as client:

        async def worker() -> None:
            for _ in left:
                started = perf_counter()
                await client.chat.completions.create(**fields, extra_body=extra)
                latencies.append(perf_counter() - started)

        started = perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return latencies, perf_counter() - started


def compared(ports: dict[str, int], load: Load, requests: int) -> list[dict[str, Any]]:
    """Median latency at concurrency 1 and rate at 16, ours and bare."""
    body = {"model": "instant", "messages": MESSAGES}
    p50: dict[str, list[float]] = {name: [] for name in ports}
    rate: dict[str, list[float]] = {name: [] for name in ports}
    for port in ports.values():
        asyncio.run(load(port, body, CONCURRENCY, requests))
    for _ in range(ROUNDS):
        for name, port in ports.items():
            latencies, _ = asyncio.run(load(port, body, 1, max(1, requests // 3)))
            p50[name].append(statistics.median(latencies) * 1e3)
            _, seconds = asyncio.run(load(port, body, CONCURRENCY, requests))
            rate[name].append(requests / seconds)
    ms = {name: statistics.median(values) for name, values in p50.items()}
    rps = {name: statistics.median(values) for name, values in rate.items()}
    client = "OpenAI SDK" if load is by_sdk else "minimal client"
    aim = "at least 0.8" if load is by_sdk else ""
    return [
        row(
            f"added p50 at concurrency 1, ms ({client})",
            ms["ours"] - ms["bare"],
            ms["ours"],
            ms["bare"],
            "at most 5",
        ),
        row(
            f"requests per second at concurrency 16, ratio ({client})",
            rps["ours"] / rps["bare"],
            rps["ours"],
            rps["bare"],
            aim,
        ),
    ]


def best_of_8(ports: dict[str, int], requests: int) -> list[dict[str, Any]]:
    """Best-of-8 by rules against one call with n=8; and on an upstream that takes 2 s, judged by 8 calls of 0.1 s."""
    plain = {"model": "instant", "messages": MESSAGES, "n": 8}
    best = {**plain, "n": 1, "align": {"best_of_n": {"n": 8}, "rewards": {"short": 1}}}
    found: dict[str, list[float]] = {"ours": [], "bare": []}
    for _ in range(ROUNDS):
        for name, body in (("bare", plain), ("ours", best)):
            latencies, _ = asyncio.run(closed_loop(ports[name], body, 1, max(1, requests // 6)))
            found[name].append(statistics.median(latencies) * 1e3)
    ours, bare = statistics.median(found["ours"]), statistics.median(found["bare"])
    judged = {
        **best,
        "model": "slow-2.0",
        "align": {"best_of_n": {"n": 8}, "rewards": {"judge": 1}},
    }
    slow = statistics.median(
        [asyncio.run(closed_loop(ports["ours"], judged, 1, 1))[1] for _ in range(3)]
    )
    raw = statistics.median(
        [
            asyncio.run(closed_loop(ports["bare"], {**plain, "model": "slow-2.0"}, 1, 1))[1]
            for _ in range(3)
        ]
    )
    return [
        row("best-of-8 over one n=8 call, ms", ours - bare, ours, bare, "at most 10"),
        row(
            "best-of-8 on a 2 s upstream with 8 judge calls of 0.1 s, s",
            slow,
            slow,
            raw,
            "at most 2.2",
        ),
    ]


def row(what: str, value: float, ours: float, baseline: float, target: str) -> dict[str, Any]:
    """One figure, what it is made of, and what was hoped for."""
    return {"what": what, "value": value, "ours": ours, "baseline": baseline, "target": target}


def main(requests: int | None) -> None:
    """Measure; written down where the number of requests is the usual one."""
    each = requests or 600
    with (
        tempfile.TemporaryDirectory() as folder,
        serving("benchmarks/serving/instant.py", "{port}", ready="/v1/models") as (bare, _),
    ):
        config = Path(folder) / "infer-align.toml"
        config.write_text(CONFIG.format(up=bare))
        command = ("-m", "infer_align_server", "serve", str(config), "--set", "server.port={port}")
        with serving(*command) as (ours, _):
            ports = {"bare": bare, "ours": ours}
            rows = [
                *compared(ports, by_sdk, each),
                *compared(ports, closed_loop, each),
                *best_of_8(ports, each),
            ]
    table = Table("what", "value", "ours", "baseline", "target")
    for found in rows:
        table.add_row(
            found["what"],
            *(f"{found[key]:.4g}" for key in ("value", "ours", "baseline")),
            found["target"],
        )
    OUT.print(table)
    if requests is None:
        setup = {
            "rounds": ROUNDS,
            "requests": each,
            "concurrency": CONCURRENCY,
            "no_seed": "replies are scripted: nothing is drawn",
        }
        OUT.print(
            "written:",
            record("upstream", baseline="the bare upstream", seed=None, rows=rows, setup=setup),
            highlight=False,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else None)
