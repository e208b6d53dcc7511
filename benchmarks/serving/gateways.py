"""Compare gateways in front of an upstream of 20 ms: ours, LiteLLM's proxy and optillm.

    python -m benchmarks.serving.gateways [--requests 1000] [--rounds 5] [--record]
        [--concurrency 1 64]
        [--litellm .venv-clients/litellm] [--optillm .venv-clients/optillm]

The baseline is the upstream itself. All get their load in the same run, in alternating rounds. The
client, the upstream and the gateway share the cores of one machine: the CPU time per request says
how much of them each gateway takes. LiteLLM and optillm are left out unless the folder of a virtual
environment with `litellm[proxy]` or `optillm` is named:

    python3.11 -m venv litellm && litellm/bin/pip install 'litellm[proxy]'
    python3.11 -m venv optillm && optillm/bin/pip install optillm

optillm asks for torch and some forty packages. As a proxy it runs with fewer: install it with
`--no-deps`, then numpy networkx openai z3-solver aiohttp flask azure-identity scipy sympy
cerebras_cloud_sdk requests httpx PyYAML litellm math-verify.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, sleep
from typing import cast
from urllib.request import urlopen

import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from benchmarks.serving.client import request_head
from benchmarks.serving.ports import free_port
from benchmarks.serving.rows import Row, row

OUT = Console(width=120)
DIRECT = "direct"
CONCURRENCIES = (1, 4, 16, 64)
DELAY_SECONDS = 0.02
# Requests of one round per connection, at most: one at a time takes long.
REQUESTS_PER_CONNECTION = 100
START_SECONDS = 120.0
BODY = {
    "model": "delayed",
    "messages": [{"role": "user", "content": "a question of some length, as people ask them"}],
}
OURS = """
[server]
log_level = "{log_level}"
workers = {workers}
[engine]
kind = "openai"
urls = ["http://127.0.0.1:{port}/v1"]
[limits]
max_running = 1024
"""
LITELLM = """
model_list:
  - model_name: delayed
    litellm_params:
      model: openai/delayed
      api_base: http://127.0.0.1:{port}/v1
      api_key: unused
general_settings:
  disable_spend_logs: true
"""
TARGETS = {
    "requests per second, ratio": "at least 0.95",
    "added p50, ms": "at most 0.5",
    "added p99, ms": "at most 2",
}


class _Sender(asyncio.Protocol):
    """A client that sends one request after the other.

    It keeps its connection. If the server closes it after an answer, the next request opens another
    one, and its latency includes that.
    """

    def __init__(
        self, port: int, request: bytes, remaining: Iterator[int], latencies: list[float]
    ) -> None:
        self._port = port
        self._request = request
        self._remaining = remaining
        self._latencies = latencies
        self._received = b""
        self._start = 0.0
        # The attempt to open a connection; it is referenced so that it is not collected.
        self._connecting: asyncio.Task[None] | None = None
        self._is_closed = True
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def send(self) -> None:
        """Send the next request, or end if none remains."""
        if next(self._remaining, None) is None:
            self._close()
            self.ended.set_result(None)
            return
        self._start = perf_counter()
        if self._is_closed:
            self._connecting = asyncio.create_task(self._connect())
        else:
            self._transport.write(self._request)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: self, "127.0.0.1", self._port)
        except OSError as error:
            self.ended.set_exception(error)

    def _close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._is_closed = False
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not _is_complete(self._received):
            return
        self._latencies.append(perf_counter() - self._start)
        answer, self._received = self._received, b""
        if not answer.startswith(b"HTTP/1.1 200"):
            self.ended.set_exception(RuntimeError(answer.decode(errors="replace")))
            self._close()
            return
        if _closes(answer):
            self._close()
        self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail if the connection was still in use."""
        if not self._is_closed and not self.ended.done():
            self.ended.set_exception(exc or ConnectionResetError("the gateway closed"))


def _closes(answer: bytes) -> bool:
    """Return True if the server closes the connection after this answer."""
    head = answer.partition(b"\r\n\r\n")[0]
    return b"\r\nconnection: close" in head.lower()


def _is_complete(answer: bytes) -> bool:
    head, separator, content = answer.partition(b"\r\n\r\n")
    if not separator:
        return False
    lower = head.lower()
    start = lower.find(b"content-length:")
    if start < 0:
        return content.endswith(b"0\r\n\r\n")
    return len(content) >= int(lower[start + 15 :].split(b"\r\n", 1)[0])


async def _load(port: int, concurrency: int, requests: int) -> tuple[list[float], float]:
    """Send requests; return the seconds of each, and of all."""
    content = json.dumps(BODY).encode()
    request = request_head("/v1/chat/completions", len(content)) + content
    remaining = iter(range(requests))
    latencies: list[float] = []
    start = perf_counter()
    senders = [_Sender(port, request, remaining, latencies) for _ in range(concurrency)]
    for sender in senders:
        sender.send()
    await asyncio.gather(*(sender.ended for sender in senders))
    return latencies, perf_counter() - start


@dataclass
class Measurements:
    """The rounds of one gateway at one concurrency."""

    rates: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, latencies: Sequence[float], seconds: float, cpu_seconds: float) -> None:
        """Add a round."""
        ordered = sorted(latencies)
        self.rates.append(len(ordered) / seconds)
        self.p50.append(1e3 * ordered[len(ordered) // 2])
        self.p99.append(1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))])
        self.cpu.append(1e6 * cpu_seconds / len(ordered))


@dataclass(frozen=True, slots=True)
class Gateway:
    """A running server."""

    port: int
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """CPU time of the process and its children so far."""
        total = 0.0
        for process in [self.process, *self.process.children(recursive=True)]:
            times = process.cpu_times()
            total += times.user + times.system
        return total


@contextmanager
def running(
    command: Sequence[str], path: str, environment: dict[str, str] | None = None
) -> Iterator[Gateway]:
    """Run a server until the end of the block; `{port}` in its command is a free port."""
    port = free_port()
    process = subprocess.Popen(
        [part.format(port=port) for part in command],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = perf_counter() + START_SECONDS
        while not _answers(f"http://127.0.0.1:{port}{path}"):
            if process.poll() is not None or perf_counter() > end:
                raise RuntimeError(f"the server did not start: {' '.join(command)}")
            sleep(0.1)
        yield Gateway(port, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(60)


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def gateways(
    litellm: Path | None, optillm: Path | None, log_level: str
) -> Iterator[dict[str, Gateway]]:
    """Run the upstream and every gateway in front of it."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def start(name: str, command: Sequence[str], path: str, **environment: str) -> None:
            running_gateway = running(command, path, environment)
            result[name] = stack.enter_context(running_gateway)

        result: dict[str, Gateway] = {}
        upstream = [sys.executable, str(Path(__file__).with_name("delayed.py")), "{port}"]
        start(DIRECT, [*upstream, "--seconds", str(DELAY_SECONDS)], "/v1/models")
        port = result[DIRECT].port
        for workers in (1, 2):
            path = folder / f"ours{workers}.toml"
            path.write_text(OURS.format(workers=workers, port=port, log_level=log_level))
            serve = [sys.executable, "-m", "infer_align_server", "serve", str(path)]
            name = f"infer-align, {workers} worker{'s' if workers > 1 else ''}"
            start(name, [*serve, "--port", "{port}"], "/ready")
        if litellm:
            path = folder / "litellm.yaml"
            path.write_text(LITELLM.format(port=port))
            command = [str(litellm / "bin/litellm"), "--config", str(path), "--port", "{port}"]
            # It accepts requests without a key only if it is allowed to.
            permit = {"LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
            start("LiteLLM proxy", command, "/health/liveliness", **permit)
        if optillm:
            command = [str(optillm / "bin/optillm"), "--port", "{port}", "--approach", "none"]
            command += ["--base-url", f"http://127.0.0.1:{port}/v1", "--model", "delayed"]
            start("optillm", command, "/health", OPENAI_API_KEY="unused")
        yield result


def compare(
    running_gateways: dict[str, Gateway],
    rounds: int,
    requests: int,
    concurrencies: Sequence[int] = CONCURRENCIES,
) -> dict[tuple[str, int], Measurements]:
    """Measure every gateway at every concurrency, in alternating rounds."""
    measured: dict[tuple[str, int], Measurements] = {}
    for number in range(rounds + 1):
        for concurrency in concurrencies:
            count = min(requests, REQUESTS_PER_CONNECTION * concurrency)
            for name, gateway in running_gateways.items():
                before = gateway.cpu_seconds()
                latencies, seconds = uvloop.run(_load(gateway.port, concurrency, count))
                cpu_seconds = gateway.cpu_seconds() - before
                # The first round warms up.
                if number:
                    measurements = measured.setdefault((name, concurrency), Measurements())
                    measurements.add(latencies, seconds, cpu_seconds)
    return measured


def rows_of(measured: dict[tuple[str, int], Measurements]) -> list[Row]:
    """Return the figures of each gateway beside those of the upstream itself."""
    rows = []
    for (name, concurrency), ours in measured.items():
        if name == DIRECT:
            continue
        direct = measured[DIRECT, concurrency]
        where = f"{name}, c = {concurrency}"
        is_bounded = name == "infer-align, 2 workers" and concurrency == CONCURRENCIES[-1]
        for what, values, baselines in (
            ("requests per second, ratio", ours.rates, direct.rates),
            ("added p50, ms", ours.p50, direct.p50),
            ("added p99, ms", ours.p99, direct.p99),
            ("CPU of the gateway per request, us", ours.cpu, direct.cpu),
        ):
            value, baseline = statistics.median(values), statistics.median(baselines)
            figure = value
            if "ratio" in what:
                figure = value / baseline
            elif "added" in what:
                figure = value - baseline
            target = TARGETS.get(what, "") if is_bounded else ""
            rows.append(row(f"{where}: {what}", figure, value, baseline, target))
    return rows


def print_table(measured: dict[tuple[str, int], Measurements]) -> None:
    """Print one line per gateway and concurrency."""
    columns = ("requests/s", "ratio", "added p50, ms", "added p99, ms", "CPU per request, us")
    table = Table("gateway", "c", *columns)
    for (name, concurrency), ours in sorted(measured.items(), key=lambda item: item[0][1]):
        direct = measured[DIRECT, concurrency]
        rate = statistics.median(ours.rates)
        table.add_row(
            name,
            str(concurrency),
            f"{rate:.0f}",
            f"{rate / statistics.median(direct.rates):.3f}",
            f"{statistics.median(ours.p50) - statistics.median(direct.p50):.2f}",
            f"{statistics.median(ours.p99) - statistics.median(direct.p99):.2f}",
            f"{statistics.median(ours.cpu):.0f}",
        )
    OUT.print(table)


def main() -> None:
    """Measure, print, and write the result if it is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=3000, help="of a round, at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=CONCURRENCIES, help="connections at once"
    )
    parser.add_argument("--litellm", type=Path, help="virtual environment with litellm[proxy]")
    parser.add_argument("--optillm", type=Path, help="virtual environment with optillm")
    parser.add_argument("--log-level", default="info", help="of infer-align")
    parser.add_argument("--record", action="store_true", help="write results/gateways.json")
    options = parser.parse_args()
    with gateways(options.litellm, options.optillm, options.log_level) as running_gateways:
        measured = compare(running_gateways, options.rounds, options.requests, options.concurrency)
    print_table(measured)
    if options.record:
        setup = {
            "no_seed": "answers are scripted: nothing is drawn",
            "rounds": options.rounds,
            "requests": options.requests,
            "upstream_seconds": DELAY_SECONDS,
            "log_level": options.log_level,
            "gateways": list(running_gateways),
        }
        baseline = "the upstream itself, in alternating rounds"
        path = record("gateways", baseline=baseline, seed=None, rows=rows_of(measured), setup=setup)
        OUT.print("written:", path, highlight=False)


if __name__ == "__main__":
    main()
