"""Measure what traces cost: switched off, not sampled, and sent to a collector.

    python -m benchmarks.serving.telemetry [--rounds 120] [--requests 20] [--record]

The baseline is a server from which every line that serves traces is taken out. All servers get
their load in the same run, in rounds whose order is drawn. The time is the lower quartile of the
medians of the rounds, one request at a time: other work on the machine only adds to it. The CPU
time is the mean per request of the server process, its sending thread included. The collector is a
process of its own that keeps nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import uvicorn
from rich.console import Console

from benchmarks.record import record
from benchmarks.serving.client import closed_loop, serving
from benchmarks.serving.rows import Row, print_rows, ratio_row
from benchmarks.serving.trace_tree import best_of_8

OUT = Console(width=140)
COLLECTOR = "benchmarks.serving.telemetry"
WITHOUT_TRACES = "benchmarks.serving.without_traces"
ROUNDS = 120
REQUESTS = 20
SEED = 0
WARM_UP = 100
MESSAGES: Any = [{"role": "user", "content": "a question of some length, as people ask them"}]
FAKE = """
[server]
log_level = "error"
[engine]
kind = "fake"
replies = [{{text = "an answer."}}, {{text = "an answer indeed."}}]
[rewards.short]
kind = "rules"
words_weight = -1.0
"""
UPSTREAM = """
[server]
log_level = "error"
[engine]
kind = "openai"
urls = ["http://127.0.0.1:{upstream}/v1"]
probe = false
"""
TELEMETRY = """
[telemetry]
endpoint = "http://127.0.0.1:{collector}"
sample_ratio = {ratio}
"""
BEST_OF_8 = {"best_of_n": {"n": 8}, "rewards": {"short": 1}}
# Kind of request -> its server, and what it asks.
LOADS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (FAKE, {"model": "fake", "messages": MESSAGES}),
    "best of 8": (FAKE, {"model": "fake", "messages": MESSAGES, "align": BEST_OF_8}),
    "passed on": (UPSTREAM, {"model": "instant", "messages": MESSAGES}),
}
BASELINE = "taken out"
# Name of a server -> the share of requests that it traces; None: no endpoint.
SHARES: dict[str, float | None] = {
    BASELINE: None,
    "switched off": None,
    "not sampled": 0.0,
    "sampled": 1.0,
}
# What holds for a server, as the target of its rows.
TARGETS = {"switched off": "at most 1.02", "not sampled": "", "sampled": ""}


@dataclass(slots=True)
class Measured:
    """The seconds per request in each round, of one server under one load."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def latency_ms(self) -> float:
        """Return the time of a request: the lower quartile of the medians of the rounds."""
        return statistics.quantiles(self.seconds)[0] * 1e3

    @property
    def cpu_ms(self) -> float:
        """Return the mean CPU time of a request; the clock is too coarse for a median."""
        return statistics.mean(self.cpu_seconds) * 1e3


async def sink(scope: Any, receive: Any, send: Any) -> None:
    """Receive what a server sends, and keep nothing (ASGI)."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-type", b"application/x-protobuf"), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


@contextmanager
def servers(names: Iterable[str] = SHARES) -> Iterator[dict[tuple[str, str], tuple[int, int]]]:
    """Run the servers of these names; yield {(name, configuration): (port, process id)}."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        upstream = ("benchmarks/serving/instant.py", "{port}")
        upstream_port, _ = stack.enter_context(serving(*upstream, ready="/v1/models"))
        own = ("-m", COLLECTOR, "--collector", "{port}")
        collector_port, _ = stack.enter_context(serving(*own, ready="/"))
        ports = {}
        for name in names:
            ratio = SHARES[name]
            for text in (FAKE, UPSTREAM):
                path = folder / f"{len(ports)}.toml"
                settings = text.format(upstream=upstream_port)
                if ratio is not None:
                    settings += TELEMETRY.format(collector=collector_port, ratio=ratio)
                path.write_text(settings)
                module = WITHOUT_TRACES if name == BASELINE else "infer_align_server"
                arguments = ("-m", module, "serve", str(path), "--set", "server.port={port}")
                ports[name, text] = stack.enter_context(serving(*arguments))
        yield ports


def measure(rounds: int, requests: int) -> dict[tuple[str, str], Measured]:
    """Return the times of each server under each load."""
    measured = {(name, load): Measured() for name in SHARES for load in LOADS}
    names = list(SHARES)
    order = random.Random(SEED)
    with servers() as ports:
        for number in range(-1, rounds):
            for load, (text, body) in LOADS.items():
                # A server that still sends its traces disturbs the next one, which must vary.
                order.shuffle(names)
                for name in names:
                    port, process = ports[name, text]
                    count = requests if number >= 0 else WARM_UP
                    seconds, cpu_seconds = _load(port, process, body, count)
                    if number >= 0:
                        measured[name, load].seconds.append(seconds)
                        measured[name, load].cpu_seconds.append(cpu_seconds)
    return measured


def _load(port: int, process: int, body: dict[str, Any], requests: int) -> tuple[float, float]:
    """Return the median seconds of a request, and the server's CPU time per request."""
    times = psutil.Process(process)
    before = sum(times.cpu_times()[:2])
    latencies, _ = asyncio.run(closed_loop(port, body, 1, requests))
    spent = sum(times.cpu_times()[:2]) - before
    return statistics.median(latencies), spent / requests


def rows_of(measured: dict[tuple[str, str], Measured]) -> list[Row]:
    """Return the ratios of times to those of the baseline."""
    rows = []
    for load in LOADS:
        baseline = measured[BASELINE, load]
        for name, target in TARGETS.items():
            ours = measured[name, load]
            what = f"{load}, {name}"
            rows.append(ratio_row(f"{what}: ms", ours.latency_ms, baseline.latency_ms, target))
            rows.append(ratio_row(f"{what}: ms of CPU time", ours.cpu_ms, baseline.cpu_ms, ""))
    return rows


def main() -> None:
    """Measure and print; with `--record`, write the result and the trace of a best-of-8."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of one round")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results")
    parser.add_argument("--collector", type=int, help="run the collector at this port, no more")
    options = parser.parse_args()
    if options.collector:
        uvicorn.run(sink, port=options.collector, log_level="warning")
        return
    rows = rows_of(measure(options.rounds, options.requests))
    print_rows(rows, OUT)
    if options.record:
        setup = {
            "rounds": options.rounds,
            "requests of a round": options.requests,
            "concurrency": 1,
            "trace": best_of_8(),
        }
        baseline = "a server without the lines that serve traces, in rounds whose order is drawn"
        path = record("telemetry", baseline=baseline, seed=SEED, rows=rows, setup=setup)
        OUT.print("written:", path, highlight=False)


if __name__ == "__main__":
    main()
