"""A server process for one scenario, and what can be seen of it from outside."""

from __future__ import annotations

import asyncio
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import aiohttp
import psutil

from benchmarks.serving.client import serving

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "What is the diet of the owl?"}]
# Longest wait for the end of what was cancelled.
SETTLE_SECONDS = 20.0
MEBIBYTE = 2**20


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    port: int
    process_id: int

    @property
    def url(self) -> str:
        """Return the address of the server, without a path."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def workers(self) -> list[psutil.Process]:
        """Return the worker processes."""
        children = psutil.Process(self.process_id).children()
        # A supervisor that starts new processes instead of forks has a helper beside them.
        return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]

    @property
    def memory(self) -> float:
        """Return the resident memory in MiB."""
        return psutil.Process(self.process_id).memory_info().rss / MEBIBYTE

    @property
    def descriptors(self) -> int:
        """Return the open file descriptors."""
        return psutil.Process(self.process_id).num_fds()

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        total = 0.0
        for line in lines:
            label, _, value = line.rpartition(" ")
            if label.partition("{")[0] == name:
                total += float(value)
        return total

    async def settled(self, descriptors: int) -> bool:
        """Return True once nothing runs and no more descriptors are open than before."""
        end = monotonic() + SETTLE_SECONDS
        while monotonic() < end:
            # Without a free descriptor, the server cannot answer.
            if self.descriptors <= descriptors:
                running = await asyncio.to_thread(self.metric, "infer_align_running_requests")
                if not running:
                    return True
            await asyncio.sleep(0.1)
        return False


@contextmanager
def served(config: str, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run a server with this configuration and further environment variables."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "infer-align.toml"
        path.write_text(config, encoding="utf-8")
        command = ("-m", "infer_align_server", "serve", str(path), "--set", "server.port={port}")
        with serving(*command, environment=environment) as (port, process_id):
            yield Server(port, process_id)


@dataclass(frozen=True, slots=True)
class Load:
    """The outcome of some requests."""

    seconds: list[float]
    statuses: list[int]

    def percentile(self, share: float) -> float:
        """Return a percentile of the latency in milliseconds."""
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def failed(self) -> int:
        """Return the requests that were not answered with 200."""
        return sum(status != 200 for status in self.statuses)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One scenario: its figure beside the undisturbed one, and whether it holds."""

    what: str
    ours: float
    baseline: float
    unit: str
    holds: bool
    detail: str


async def load(
    server: Server, body: dict[str, Any], requests: int, concurrency: int, key: str = ""
) -> Load:
    """Send requests, so many at a time; status 0 stands for a broken connection."""
    remaining = iter(range(requests))
    seconds: list[float] = []
    statuses: list[int] = []
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

        async def worker() -> None:
            for _ in remaining:
                start = perf_counter()
                try:
                    async with session.post(server.url + CHAT, json=body) as answer:
                        await answer.read()
                        statuses.append(answer.status)
                except aiohttp.ClientError:
                    statuses.append(0)
                seconds.append(perf_counter() - start)

        await asyncio.gather(*(worker() for _ in range(concurrency)))
    return Load(seconds, statuses)
