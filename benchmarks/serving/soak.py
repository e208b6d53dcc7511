"""A long run of everything at once: plain, streamed, selected and wrong requests, clients that leave, candidates that fail.

    python -m benchmarks.serving.soak [--minutes 30] [--concurrency 64] [--target upstream|fake|FILE] [--model name] [--record]

It ends with 1 unless memory stayed flat, no task, connection or thread was left over, and every request was answered or given up
by its client. The target is the engine `openai` before an upstream that answers half of its calls and does to the others what the
tests' upstream can do (written to results/soak.json); or the fake engine, with faults, a short queue and small budgets
(soak_fake.json); or a configuration of your own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.request import urlopen

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from benchmarks.serving.client import serving
from tests.engines.openai.upstream import fake_upstream

OUT = Console()
CONFIG = """
[engine]
kind = "fake"
replies = [
    {text = "a short answer"}, {text = "one that takes a little longer to say", seconds_per_token = 0.01},
    {text = "one that fails", error = "out of memory", status = 500}, {text = "late", first_token_seconds = 0.3},
    {text = "one that is busy", error = "slow down", status = 429},
]
[rewards.brevity]
kind = "rules"
words_weight = -1.0
[limits]
max_running = 32
max_queue = 24
candidate_tokens_per_minute = 3_000_000
[server]
keepalive_seconds = 0.2
log_level = "error"
"""
UPSTREAM = """
[engine]
kind = "openai"
urls = ["{url}"]
model = "{model}"
probe = false
timeout_seconds = 2.0
max_retry_wait_seconds = 0.2
[rewards.brevity]
kind = "rules"
words_weight = -1.0
[limits]
max_running = 48
max_queue = 24
[server]
keepalive_seconds = 0.2
log_level = "error"
"""
UPSTREAM_FAULTS = (
    "error_500",
    "error_400",
    "error_429",
    "error_502",
    "error_503",
    "redirect",
    "hang",
    "drip",
    "garbage",
    "html",
    "error_in_200",
    "no_choices",
    "truncated",
    "ended_early",
    "reset",
    "slow_reset",
    "message_missing",
    "infinite",
    "half_a_character",
    "sse_as_json",
    "garbage_in_stream",
    "odd_in_stream",
)
USER = [{"role": "user", "content": "What is the diet of the owl?"}]
CHAT, SCORE = "/v1/chat/completions", "/v1/align/score"
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {}),
    (CHAT, {"stream": True}),
    (CHAT, {"n": 3}),
    (CHAT, {"align": {"best_of_n": {"n": 5}}}),
    (
        CHAT,
        {
            "align": {"best_of_n": {"n": 8}},
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    (CHAT, {"align": {"best_of_n": {"n": 5}, "budget": {"deadline_seconds": 0.1}}}),
    (CHAT, {"align": {"best_of": {}}}),
    (CHAT, {"model": "nobody"}),
    (CHAT, {"messages": []}),
    (SCORE, {"candidates": ["mice", "mice and voles"]}),
]
ANSWERS = {200, 400, 404, 429, 500, 502, 503, 504}
# Of the requests, the share whose client leaves, and after how many seconds at most.
LEAVING, PATIENCE = 0.2, 0.4
UNANSWERED_SECONDS = 60.0
SETTLE_SECONDS = 30.0  # at most: connections that are kept to an upstream are closed when they have been idle for a while


@dataclass
class Seen:
    """What happened."""

    statuses: Counter[int] = field(default_factory=Counter)
    left: int = 0
    unanswered: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    memory: list[float] = field(default_factory=list)

    @property
    def answered(self) -> int:
        """Requests with a whole answer."""
        return sum(self.statuses.values())


async def exchange(port: int, path: str, body: dict[str, Any], leave: float | None) -> int | None:
    """One request on a connection of its own; -> its status once all of it has come, None where the client left first."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        writer.write(
            head + (content if leave != 0.0 else content[:-1])
        )  # who leaves at once has not even said all
        try:
            async with asyncio.timeout(leave):
                answer = await reader.read(-1)
        except TimeoutError:
            return None
    finally:
        writer.transport.abort()
    header, _, text = answer.partition(b"\r\n\r\n")
    status = int(header[9:12])
    if b"chunked" in header and not text.endswith(b"0\r\n\r\n"):
        raise ValueError("the stream ended without its end")
    if status not in ANSWERS:
        raise ValueError(f"status {status}")
    return status


async def client(port: int, model: str, until: float, seen: Seen, chance: random.Random) -> None:
    """One of many: request after request, some of them given up."""
    while perf_counter() < until:
        path, fields = chance.choice(REQUESTS)
        leave = (
            chance.choice((0.0, chance.uniform(0, PATIENCE))) if chance.random() < LEAVING else None
        )
        try:
            async with asyncio.timeout(UNANSWERED_SECONDS):
                status = await exchange(
                    port,
                    path,
                    {"model": model, "messages": USER, "max_tokens": 32, **fields},
                    leave,
                )
            if status is None:
                seen.left += 1
            else:
                seen.statuses[status] += 1
        except TimeoutError:
            seen.unanswered += 1
        except (OSError, ValueError) as error:
            seen.broken[f"{type(error).__name__}: {error}"] += 1


async def watch(pid: int, until: float, every: float, seen: Seen) -> None:
    """The process's memory, now and then."""
    process = psutil.Process(pid)
    while perf_counter() < until:
        seen.memory.append(process.memory_info().rss / 2**20)
        await asyncio.sleep(every)


def state(port: int, pid: int) -> dict[str, float]:
    """What could be left over."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = dict(
            line.rsplit(" ", 1)
            for line in answer.read().decode().splitlines()
            if not line.startswith("#")
        )
    process = psutil.Process(pid)
    counts = {
        name: float(lines[f"infer_align_{name}"])
        for name in ("running_requests", "queued_requests", "tasks")
    }
    open_now = [c for c in process.net_connections() if c.status == psutil.CONN_ESTABLISHED]
    descriptors, threads = float(process.num_fds()), float(process.num_threads())
    return {
        **counts,
        "connections": float(len(open_now)),
        "descriptors": descriptors,
        "threads": threads,
    }


async def soak(
    port: int, pid: int, model: str, seconds: float, concurrency: int, seed: int = 0
) -> dict[str, Any]:
    """Run, wait until it is quiet; -> what was seen, and what is wrong with it."""
    chance = random.Random(seed)
    await asyncio.gather(
        *(exchange(port, *request(model, i), None) for i in range(len(REQUESTS)))
    )  # caches and threads are made
    before, seen = state(port, pid), Seen()
    until = perf_counter() + seconds
    clients = [
        client(port, model, until, seen, random.Random(chance.random())) for _ in range(concurrency)
    ]
    await asyncio.gather(watch(pid, until, max(0.25, seconds / 200), seen), *clients)
    quiet = perf_counter() + SETTLE_SECONDS
    while _rose(before, after := state(port, pid)) and perf_counter() < quiet:
        await asyncio.sleep(0.1)
    quarter = max(1, len(seen.memory) // 4)
    early, late = (
        statistics.median(seen.memory[quarter : 2 * quarter] or seen.memory),
        statistics.median(seen.memory[-quarter:]),
    )
    return {
        "answered": seen.answered,
        "left": seen.left,
        "statuses": dict(sorted(seen.statuses.items())),
        "unanswered": seen.unanswered,
        "broken": dict(seen.broken),
        "before": before,
        "after": after,
        "memory_early": early,
        "memory_late": late,
        "memory_first": seen.memory[0],
        "memory_last": seen.memory[-1],
    }


def _rose(before: dict[str, float], after: dict[str, float]) -> list[str]:
    return [
        f"{name} rose from {before[name]:.0f} to {now:.0f}"
        for name, now in after.items()
        if now > before[name]
    ]


@contextmanager
def target(name: str, model: str, seed: int) -> Iterator[Path]:
    """The configuration to soak, and what has to run for it."""
    if name not in {"fake", "upstream"}:
        yield Path(name)
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        path = Path(folder) / "infer-align.toml"
        text = CONFIG
        if name == "upstream":
            app, chance = running.enter_context(fake_upstream()), random.Random(seed)
            app.behave = lambda _, __: (
                "ok" if chance.random() < 0.5 else chance.choice(UPSTREAM_FAULTS)
            )
            app.word_seconds = 0.02
            text = UPSTREAM.format(url=app.url, model=model)
        path.write_text(text)
        yield path


def request(model: str, index: int) -> tuple[str, dict[str, Any]]:
    """A path and a body."""
    path, fields = REQUESTS[index % len(REQUESTS)]
    return path, {"model": model, "messages": USER, "max_tokens": 32, **fields}


def faults(result: dict[str, Any], growth: float) -> list[str]:
    """What is wrong, in words."""
    wrong = _rose(result["before"], result["after"])
    if result["unanswered"] or result["broken"]:
        wrong.append(f"{result['unanswered']} requests unanswered, {result['broken']} broken")
    if result["memory_late"] - result["memory_early"] > growth:
        wrong.append(
            f"memory grew from {result['memory_early']:.1f} to {result['memory_late']:.1f} MiB"
        )
    return wrong


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What is written down: memory, what could be left over, and what became of the requests."""
    memory = {
        "what": "resident memory, MiB: median of the last quarter, against the second",
        "target": "flat",
    }
    ends = {"what": "resident memory, MiB: last, against first", "target": ""}
    left_over = [
        {
            "what": name,
            "value": now - result["before"][name],
            "ours": now,
            "baseline": result["before"][name],
            "target": "0",
        }
        for name, now in result["after"].items()
    ]
    asked = (
        result["answered"] + result["left"] + result["unanswered"] + sum(result["broken"].values())
    )
    became = {
        "answered": result["answered"],
        "cancelled by their clients": result["left"],
        "neither": asked - result["answered"] - result["left"],
    }
    return [
        {
            **memory,
            "value": result["memory_late"] - result["memory_early"],
            "ours": result["memory_late"],
            "baseline": result["memory_early"],
        },
        {
            **ends,
            "value": result["memory_last"] - result["memory_first"],
            "ours": result["memory_last"],
            "baseline": result["memory_first"],
        },
        *left_over,
        *(
            {
                "what": f"requests {what}",
                "value": n,
                "ours": n,
                "baseline": asked,
                "target": "0" if what == "neither" else "",
            }
            for what, n in became.items()
        ),
    ]


def main() -> int:
    """Start the server, soak it, print, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument(
        "--target",
        default="upstream",
        help='"upstream", "fake" or a configuration; default: %(default)s',
    )
    parser.add_argument(
        "--model", default="fake", help="the name it is served under; default: %(default)s"
    )
    parser.add_argument(
        "--growth",
        type=float,
        default=8.0,
        help="MiB that memory may grow by from the second quarter to the last",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--record",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write the result down, or only print",
    )
    options = parser.parse_args()
    with (
        target(options.target, options.model, options.seed) as config,
        serving(
            "-m", "infer_align_server", "serve", str(config), "--set", "server.port={port}"
        ) as (port, pid),
    ):
        result = asyncio.run(
            soak(port, pid, options.model, options.minutes * 60, options.concurrency, options.seed)
        )
    table = Table("what", "value")
    for name, value in result.items():
        table.add_row(name, str(value))
    OUT.print(table)
    wrong = faults(result, options.growth)
    OUT.print("\n".join(wrong) or "nothing is left over")
    if options.record:
        setup = {**vars(options), "result": result, "wrong": wrong}
        name = "soak" if options.target == "upstream" else f"soak_{Path(options.target).stem}"
        path = record(
            name,
            baseline="the same process at the start",
            seed=options.seed,
            rows=rows(result),
            setup=setup,
        )
        OUT.print("written:", path, highlight=False)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
