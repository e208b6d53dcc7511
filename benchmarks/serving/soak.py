"""Run every kind of request for a long time: plain, streamed, selected and wrong ones.

Some clients leave before the answer, and some candidates fail.

    python -m benchmarks.serving.soak [--minutes 30] [--concurrency 64]
        [--target upstream|fake|FILE] [--model name] [--record]

The exit code is 1 unless memory stayed flat, no task, connection or thread is left over, and every
request was answered or given up by its client. The target "upstream" is the engine `openai` with an
upstream that answers half of its calls and fails the others in every way that the tests' upstream
can (result: results/soak.json). The target "fake" is the fake engine with faults, a short queue and
small budgets (soak_fake.json). Any other target is the file of a configuration.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.request import urlopen

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from benchmarks.serving.client import request_head, serving
from benchmarks.serving.rows import Row, row
from benchmarks.serving.soak_target import target_config

OUT = Console()
MESSAGES = [{"role": "user", "content": "What is the diet of the owl?"}]
CHAT = "/v1/chat/completions"
SCORE = "/v1/align/score"
BEST_OF_5 = {"best_of_n": {"n": 5}}
# Path and body fields of each kind of request.
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {}),
    (CHAT, {"stream": True}),
    (CHAT, {"n": 3}),
    (CHAT, {"align": BEST_OF_5}),
    (
        CHAT,
        {
            "align": {"best_of_n": {"n": 8}},
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    (CHAT, {"align": {**BEST_OF_5, "budget": {"deadline_seconds": 0.1}}}),
    (CHAT, {"align": {"best_of": {}}}),
    (CHAT, {"model": "nobody"}),
    (CHAT, {"messages": []}),
    (SCORE, {"candidates": ["mice", "mice and voles"]}),
]
EXPECTED_STATUSES = {200, 400, 404, 429, 500, 502, 503, 504}
# Share of the requests whose client leaves, and the seconds after which it leaves at the latest.
LEAVING_SHARE = 0.2
MAX_LEAVING_SECONDS = 0.4
UNANSWERED_SECONDS = 60.0
# Longest wait for the end of everything: idle connections to an upstream stay open for a while.
SETTLE_SECONDS = 30.0
MEBIBYTE = 2**20


@dataclass
class Outcomes:
    """The outcomes of all requests, and the memory of the server."""

    # Complete answers, by status.
    statuses: Counter[int] = field(default_factory=Counter)
    # Requests whose client left.
    departed: int = 0
    # Requests without an answer within a minute.
    unanswered: int = 0
    # Requests with a wrong or incomplete answer, by error.
    broken: Counter[str] = field(default_factory=Counter)
    # Resident memory in MiB, in regular intervals.
    memory: list[float] = field(default_factory=list)

    @property
    def answered(self) -> int:
        """Return the number of requests with a complete answer."""
        return sum(self.statuses.values())


@dataclass(frozen=True)
class Server:
    """The server under test, and when to stop."""

    port: int
    process_id: int
    model: str
    # The clients stop when this many seconds have passed ...
    seconds: float
    # ... and this many requests were answered.
    min_answers: int = 0


def request_at(model: str, index: int) -> tuple[str, dict[str, Any]]:
    """Return path and body of a request of the kind with this index."""
    path, fields = REQUESTS[index % len(REQUESTS)]
    return path, {"model": model, "messages": MESSAGES, "max_tokens": 32, **fields}


async def exchange(
    port: int, path: str, body: dict[str, Any], leave_after: float | None
) -> int | None:
    """Send one request on a connection of its own.

    Args:
        port: of the server.
        path: of the request.
        body: of the request.
        leave_after: seconds after which the client leaves; 0: before it has sent the complete body;
            None: never.

    Returns:
        The status of the complete answer; None if the client left.

    Raises:
        ValueError: the status is not expected, or a stream ended early.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    sent = content[:-1] if leave_after == 0.0 else content
    try:
        writer.write(request_head(path, len(content), "Connection: close") + sent)
        async with asyncio.timeout(leave_after):
            answer = await reader.read(-1)
    except TimeoutError:
        return None
    finally:
        writer.transport.abort()
    return _status(answer)


def _status(answer: bytes) -> int:
    """Return the status of a complete answer."""
    header, _, text = answer.partition(b"\r\n\r\n")
    status = int(header[9:12])
    if b"chunked" in header and not text.endswith(b"0\r\n\r\n"):
        raise ValueError("the stream ended without its last chunk")
    if status not in EXPECTED_STATUSES:
        raise ValueError(f"status {status}")
    return status


class Soak:
    """Clients that send requests to a server until it is time to stop."""

    def __init__(self, server: Server, concurrency: int, seed: int) -> None:
        self.outcomes = Outcomes()
        self._server = server
        self._concurrency = concurrency
        self._generator = random.Random(seed)
        self._end = perf_counter() + server.seconds

    async def run(self) -> None:
        """Run all clients, and read the server's memory meanwhile."""
        seeds = [self._generator.random() for _ in range(self._concurrency)]
        clients = [self._client(random.Random(seed)) for seed in seeds]
        await asyncio.gather(self._watch_memory(), *clients)

    def _active(self) -> bool:
        if perf_counter() < self._end:
            return True
        return self.outcomes.answered < self._server.min_answers

    async def _client(self, generator: random.Random) -> None:
        """Send one request after the other, and leave before some of the answers."""
        while self._active():
            path, body = request_at(self._server.model, generator.randrange(len(REQUESTS)))
            leave_after = None
            if generator.random() < LEAVING_SHARE:
                leave_after = generator.choice((0.0, generator.uniform(0, MAX_LEAVING_SECONDS)))
            await self._request(path, body, leave_after)

    async def _request(self, path: str, body: dict[str, Any], leave_after: float | None) -> None:
        outcomes = self.outcomes
        try:
            async with asyncio.timeout(UNANSWERED_SECONDS):
                status = await exchange(self._server.port, path, body, leave_after)
        except TimeoutError:
            outcomes.unanswered += 1
        except (OSError, ValueError) as error:
            outcomes.broken[f"{type(error).__name__}: {error}"] += 1
        else:
            if status is None:
                outcomes.departed += 1
            else:
                outcomes.statuses[status] += 1

    async def _watch_memory(self) -> None:
        process = psutil.Process(self._server.process_id)
        interval = max(0.25, self._server.seconds / 200)
        while self._active():
            self.outcomes.memory.append(process.memory_info().rss / MEBIBYTE)
            await asyncio.sleep(interval)


def read_state(server: Server) -> dict[str, float]:
    """Return the numbers of everything that could be left over in the server."""
    with urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    metrics = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            metrics[name] = value
    process = psutil.Process(server.process_id)
    state = {}
    for name in ("running_requests", "queued_requests", "tasks"):
        state[name] = float(metrics[f"infer_align_{name}"])
    state["connections"] = float(
        sum(item.status == psutil.CONN_ESTABLISHED for item in process.net_connections())
    )
    state["descriptors"] = float(process.num_fds())
    state["threads"] = float(process.num_threads())
    return state


async def run_soak(server: Server, concurrency: int, seed: int = 0) -> dict[str, Any]:
    """Run all clients, wait until the server is quiet, and return the result."""
    # One request of each kind creates caches and threads, which are not left-overs.
    warmup = []
    for i in range(len(REQUESTS)):
        path, body = request_at(server.model, i)
        warmup.append(exchange(server.port, path, body, None))
    await asyncio.gather(*warmup)
    before = read_state(server)
    soak = Soak(server, concurrency, seed)
    await soak.run()
    after = await _settled_state(server, before)
    outcomes = soak.outcomes
    memory = outcomes.memory
    quarter = max(1, len(memory) // 4)
    second_quarter = memory[quarter : 2 * quarter] or memory
    return {
        "answered": outcomes.answered,
        "left": outcomes.departed,
        "statuses": dict(sorted(outcomes.statuses.items())),
        "unanswered": outcomes.unanswered,
        "broken": dict(outcomes.broken),
        "before": before,
        "after": after,
        "memory_early": statistics.median(second_quarter),
        "memory_late": statistics.median(memory[-quarter:]),
        "memory_first": memory[0],
        "memory_last": memory[-1],
    }


async def _settled_state(server: Server, before: Mapping[str, float]) -> dict[str, float]:
    """Wait until nothing exceeds its number before the run, or the time is over."""
    end = perf_counter() + SETTLE_SECONDS
    state = read_state(server)
    while _increases(before, state) and perf_counter() < end:
        await asyncio.sleep(0.1)
        state = read_state(server)
    return state


def _increases(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    messages = []
    for name, value in after.items():
        if value > before[name]:
            messages.append(f"{name} rose from {before[name]:.0f} to {value:.0f}")
    return messages


def faults(result: dict[str, Any], growth: float) -> list[str]:
    """Describe what is wrong with a result; `growth` is the allowed growth of memory in MiB."""
    messages = _increases(result["before"], result["after"])
    if result["unanswered"] or result["broken"]:
        messages.append(f"{result['unanswered']} requests unanswered, {result['broken']} broken")
    early = result["memory_early"]
    late = result["memory_late"]
    if late - early > growth:
        messages.append(f"memory grew from {early:.1f} to {late:.1f} MiB")
    return messages


def make_rows(result: dict[str, Any]) -> list[Row]:
    """Return the rows of the result: memory, left-overs and the outcomes of the requests."""
    early, late = result["memory_early"], result["memory_late"]
    first, last = result["memory_first"], result["memory_last"]
    rows = [
        row(
            "resident memory, MiB: median of the last quarter, against the second",
            late - early,
            late,
            early,
            "flat",
        ),
        row("resident memory, MiB: last, against first", last - first, last, first, ""),
    ]
    for name, after in result["after"].items():
        before = result["before"][name]
        rows.append(row(name, after - before, after, before, "0"))
    answered = result["answered"]
    departed = result["left"]
    neither = result["unanswered"] + sum(result["broken"].values())
    total = answered + departed + neither
    return [
        *rows,
        row("requests answered", answered, answered, total, ""),
        row("requests cancelled by their clients", departed, departed, total, ""),
        row("requests neither", neither, neither, total, "0"),
    ]


def main() -> int:
    """Start the server, run the soak, print and write the result."""
    options = _options()
    with (
        target_config(options.target, options.model, options.seed) as config,
        serving(
            "-m", "infer_align_server", "serve", str(config), "--set", "server.port={port}"
        ) as (port, process_id),
    ):
        server = Server(port, process_id, options.model, options.minutes * 60)
        result = asyncio.run(run_soak(server, options.concurrency, options.seed))
    table = Table("what", "value")
    for name, value in result.items():
        table.add_row(name, str(value))
    OUT.print(table)
    wrong = faults(result, options.growth)
    OUT.print("\n".join(wrong) or "nothing is left over")
    if options.record:
        name = "soak" if options.target == "upstream" else f"soak_{Path(options.target).stem}"
        path = record(
            name,
            baseline="the same process at the start",
            seed=options.seed,
            rows=make_rows(result),
            setup={**vars(options), "result": result, "wrong": wrong},
        )
        OUT.print("written:", path, highlight=False)
    return 1 if wrong else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="default: %(default)g")
    parser.add_argument(
        "--concurrency", type=int, default=64, help="number of clients; default: %(default)s"
    )
    parser.add_argument(
        "--target",
        default="upstream",
        help="upstream, fake, or the file of a configuration; default: %(default)s",
    )
    parser.add_argument(
        "--model", default="fake", help="name of the served model; default: %(default)s"
    )
    parser.add_argument(
        "--growth",
        type=float,
        default=8.0,
        help="allowed growth of memory in MiB from the second quarter to the last; "
        "default: %(default)g",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of requests and faults; default: %(default)s"
    )
    parser.add_argument(
        "--record",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write the result to benchmarks/results",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
