"""Compare the demo's one CPU thread with a thread per core, in requests per second over HTTP.

The client shares the machine with the server, as on the machine of somebody who tries the demo.
Both servers run at once; in each round one serves after the other, in an order that is drawn.

    python -m benchmarks.serving.threads [--rounds 9]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks.record import record
from benchmarks.serving.client import DEMO, closed_loop, serving
from benchmarks.serving.rows import Row, print_rows, ratio_row

TOKENS = 24
SEED = 0
# Requests of one measurement, at least, and per concurrent request.
REQUESTS = 48
REQUESTS_EACH = 6
OUT = Console()


class Load(NamedTuple):
    """One kind of request, sent by several clients at once."""

    name: str
    align: dict[str, Any] | None
    concurrency: int

    @property
    def body(self) -> dict[str, Any]:
        """Return the body of a request."""
        body: dict[str, Any] = {
            "model": "demo",
            "messages": [{"role": "user", "content": "write about the sea"}],
            "max_tokens": TOKENS,
            "seed": SEED,
        }
        return body if self.align is None else {**body, "align": self.align}

    async def rate(self, port: int) -> float:
        """Return the requests per second of one measurement."""
        requests = max(REQUESTS, REQUESTS_EACH * self.concurrency)
        _, seconds = await closed_loop(port, self.body, self.concurrency, requests)
        return requests / seconds


STEERED = {"vas": {"beta": {"helpful": 2}}}
BEST_OF_8 = {"best_of_n": {"n": 8}}
LOADS = (
    Load("plain", None, 1),
    Load("plain", None, 8),
    Load("plain", None, 32),
    Load("steered", STEERED, 8),
    Load("best of 8", BEST_OF_8, 8),
)


def measure(load: Load, ports: dict[str, int], rounds: int) -> dict[str, list[float]]:
    """Return the requests per second of each server in each round."""
    order = random.Random(SEED)
    rates: dict[str, list[float]] = {name: [] for name in ports}
    # The first round warms up.
    for number in range(rounds + 1):
        for name in order.sample(sorted(ports), len(ports)):
            rate = asyncio.run(load.rate(ports[name]))
            if number:
                rates[name].append(rate)
    return rates


def _row(load: Load, rates: dict[str, list[float]]) -> Row:
    ours, baseline = rates["ours"], rates["baseline"]
    what = f"{load.name}, {load.concurrency} at once: requests per second"
    row = ratio_row(what, statistics.median(ours), statistics.median(baseline), ">= 1")
    return {**row, "rounds": ours, "baseline_rounds": baseline}


def main() -> None:
    """Measure, record and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    cores = os.cpu_count() or 1
    every_core = ("--set", f"engine.threads={cores}")
    rows: list[Row] = []
    with serving(*DEMO) as (ours, _), serving(*DEMO, *every_core) as (baseline, _):
        for load in LOADS:
            OUT.print(f"[dim]{load.name}, {load.concurrency} at once ...[/]")
            rates = measure(load, {"ours": ours, "baseline": baseline}, rounds)
            rows.append(_row(load, rates))
    record(
        "threads",
        baseline=f"the same server with engine.threads = {cores}, in alternating rounds",
        seed=SEED,
        rows=rows,
        setup={"rounds": rounds, "tokens": TOKENS, "cores": cores, "model": "demo"},
    )
    print_rows(rows, OUT)


if __name__ == "__main__":
    main()
