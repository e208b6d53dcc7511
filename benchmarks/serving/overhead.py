"""Compare our server with a bare one: latency of single requests, and rate of concurrent ones."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.serving.answers import check_equal
from benchmarks.serving.client import Connection
from benchmarks.serving.rows import Row, row

CONCURRENCY = 16
# (port, body, concurrency, requests) -> (seconds of each request, seconds of all)
ClosedLoop = Callable[[int, dict[str, Any], int, int], Awaitable[tuple[list[float], float]]]
# Ports of the bare server ("bare") and of our server ("ours").
Ports = dict[str, int]


def compare_overhead(
    ports: Ports,
    loop: ClosedLoop,
    body: dict[str, Any],
    *,
    rounds: int,
    requests: int,
    warmup: int,
    rate_target: str,
    label: str = "",
) -> list[Row]:
    """Compare the median latency at concurrency 1 and the rate at concurrency 16.

    The answers of both servers are scripted and must be equal.

    Args:
        ports: of both servers, which get their load in alternating rounds.
        loop: the load generator.
        body: of every request.
        rounds: number of rounds.
        requests: of a round at concurrency 16; a third of them at concurrency 1.
        warmup: requests to each server before the first round.
        rate_target: target of the ratio of rates.
        label: end of the names of the rows.
    """
    check_equal(*(asyncio.run(_answer(port, body)) for port in ports.values()))
    latencies_ms: dict[str, list[float]] = {name: [] for name in ports}
    rates: dict[str, list[float]] = {name: [] for name in ports}
    for port in ports.values():
        asyncio.run(loop(port, body, CONCURRENCY, warmup))
    for _ in range(rounds):
        for name, port in ports.items():
            latencies, _ = asyncio.run(loop(port, body, 1, max(1, requests // 3)))
            latencies_ms[name].append(statistics.median(latencies) * 1e3)
            _, seconds = asyncio.run(loop(port, body, CONCURRENCY, requests))
            rates[name].append(requests / seconds)
    latency = {name: statistics.median(values) for name, values in latencies_ms.items()}
    rate = {name: statistics.median(values) for name, values in rates.items()}
    return [
        row(
            f"added p50 at concurrency 1, ms{label}",
            latency["ours"] - latency["bare"],
            latency["ours"],
            latency["bare"],
            "at most 5",
        ),
        row(
            f"requests per second at concurrency 16, ratio{label}",
            rate["ours"] / rate["bare"],
            rate["ours"],
            rate["bare"],
            rate_target,
        ),
    ]


async def _answer(port: int, body: dict[str, Any]) -> dict[str, Any]:
    connection = Connection(port)
    answer = await connection.post("/v1/chat/completions", json.dumps(body).encode())
    connection.close()
    return answer
