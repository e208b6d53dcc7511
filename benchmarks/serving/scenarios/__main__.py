"""Run the scenarios, each in less than a minute, and print a table.

    python -m benchmarks.serving.scenarios [--only NAME] [--scale 1.0] [--record]

The exit code is 1 if a scenario failed: a request was lost, a limit did not hold, or something was
left over. Latencies are reported beside those without the disturbance, in the same run.

With `--only`, `--record` writes a result of its own, such as `scenarios_memory`, because one
scenario may run at another scale.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import resource
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic

from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from benchmarks.serving.client import request_head, serving
from benchmarks.serving.rows import row
from benchmarks.serving.scenarios.clock import WallClock
from benchmarks.serving.scenarios.server import (
    CHAT,
    MESSAGES,
    Load,
    Outcome,
    Server,
    load,
    served,
)
from benchmarks.serving.scenarios.stores import full_disk, read_only_store

OUT = Console()
INSTANT = str(Path(__file__).parents[1] / "instant.py")
KEYS = "SCENARIO_KEYS"
HOUR = 3600
# Requests per minute of a key, more than one scenario sends with another.
RATE = 300
BODY = {"messages": MESSAGES}
LONG_BEST_OF_64 = {**BODY, "max_tokens": 20, "align": {"best_of_n": {"n": 64}}}
FAKE = """
[engine]
kind = "fake"
replies = [{text = "one two three four five six", seconds_per_token = 0.01}]
[rewards.brief]
kind = "rules"
words_weight = -1.0
[server]
log_level = "error"
"""
# The same, with two API keys.
KEYED = FAKE.replace("[server]", f'[server]\napi_keys_env = "{KEYS}"')
TWO_KEYS = {KEYS: "ann,flood"}
# A stream that does not end by itself while a scenario runs.
ENDLESS = FAKE.replace("0.01", "5.0")


async def key_flood(scale: float) -> Outcome:
    """One key sends far more than fits; another key sends one request after another."""
    config = f"{KEYED}[limits]\nmax_running = 4\nmax_queue = 64\n"
    with served(config, TWO_KEYS) as server:
        count = round(40 * scale)
        alone = await load(server, BODY, count, 1, "ann")
        flood = asyncio.create_task(load(server, BODY, count * 40, 48, "flood"))
        await asyncio.sleep(0.5)
        beside = await load(server, BODY, count, 1, "ann")
        flooded = await flood
    detail = f"{len(flooded.statuses)} requests of the other key, {flooded.failed} refused"
    ours, baseline = beside.percentile(0.99), alone.percentile(0.99)
    # A request waits for one place at most, not for the queue of the other key.
    holds = not beside.failed and ours < 10 * baseline
    return Outcome("key flood: p99 of the other key", ours, baseline, "ms", holds, detail)


async def head_of_line(scale: float) -> Outcome:
    """Long best-of-64 requests run beside short ones of another key."""
    with served(KEYED, TWO_KEYS) as server:
        count = round(40 * scale)
        alone = await load(server, BODY, count, 1, "ann")
        long = asyncio.create_task(load(server, LONG_BEST_OF_64, round(400 * scale), 16, "flood"))
        await asyncio.sleep(0.3)
        beside = await load(server, BODY, count, 1, "ann")
        longs = await long
    detail = f"{len(longs.statuses)} best-of-64, {longs.failed} failed"
    ours, baseline = beside.percentile(0.99), alone.percentile(0.99)
    # The candidates take turns with the short requests in one event loop; none blocks it.
    holds = not beside.failed and not longs.failed and ours < 10 * baseline
    return Outcome("head of line: p99 of short requests", ours, baseline, "ms", holds, detail)


async def memory_drift(scale: float) -> Outcome:
    """Many requests leave the memory as it is."""
    config = FAKE.replace("seconds_per_token = 0.01", "seconds_per_token = 0")
    with served(config) as server:
        # What is allocated once, such as caches, has been allocated after these.
        await load(server, BODY, round(4000 * min(scale, 5.0)), 16)
        start = server.memory
        answers = await load(server, BODY, round(12_000 * scale), 16)
        end = server.memory
    holds = not answers.failed and end - start < 16
    detail = f"{len(answers.statuses)} requests, {answers.failed} failed"
    return Outcome("memory after many requests", end, start, "MiB", holds, detail)


async def failover(scale: float) -> Outcome:
    """One of two upstreams is killed under load, and comes back."""
    count = round(800 * scale)
    with ExitStack() as stack:
        first, _ = stack.enter_context(serving(INSTANT, "{port}", ready="/v1/models"))
        with ExitStack() as dying:
            second, process_id = dying.enter_context(serving(INSTANT, "{port}", ready="/v1/models"))
            urls = json.dumps([f"http://127.0.0.1:{port}/v1" for port in (first, second)])
            config = f'[engine]\nkind = "openai"\nurls = {urls}\nmodel = "instant"\n'
            server = stack.enter_context(served(f'{config}[server]\nlog_level = "error"\n'))
            before = await load(server, BODY, count, 8)
            running = asyncio.create_task(load(server, BODY, count * 2, 8))
            await asyncio.sleep(0.1)
            os.kill(process_id, 9)
            during = await running
        again = await asyncio.create_subprocess_exec(sys.executable, INSTANT, str(second))
        stack.callback(again.kill)
        after = await load(server, BODY, count, 8)
    lost = before.failed + during.failed + after.failed
    detail = f"{len(during.statuses)} requests over the death, {lost} lost"
    ours, baseline = during.percentile(0.99), before.percentile(0.99)
    return Outcome("upstream killed: p99", ours, baseline, "ms", lost == 0, detail)


async def slow_readers(scale: float) -> Outcome:
    """Clients of one key start streams and read nothing; another key is answered meanwhile."""
    with served(KEYED, TWO_KEYS) as server:
        count = round(60 * scale)
        alone = await load(server, BODY, count, 1, "ann")
        descriptors = server.descriptors
        body = json.dumps({**BODY, "stream": True, "n": 8}).encode()
        writers = [await _send(server, body, "flood") for _ in range(round(200 * scale))]
        beside = await load(server, BODY, count, 1, "ann")
        for writer in writers:
            writer.transport.abort()
        settled = await server.settled(descriptors)
    detail = f"{len(writers)} clients that do not read; all closed after: {settled}"
    ours, baseline = beside.percentile(0.99), alone.percentile(0.99)
    # With few requests, a percentile of them says little.
    is_bounded = scale < 1 or ours < 10 * baseline
    holds = not beside.failed and settled and is_bounded
    return Outcome("slow readers: p99 of the others", ours, baseline, "ms", holds, detail)


async def disconnects(scale: float) -> Outcome:
    """Many clients leave at once in the middle of their streams."""
    clients = round(1000 * scale)
    with served(f"{ENDLESS}[limits]\nmax_running = {clients}\nmax_queue = {clients}\n") as server:
        await load(server, {**BODY, "messages": []}, 4, 1)
        descriptors = server.descriptors
        body = json.dumps({**BODY, "stream": True}).encode()
        writers = [await _send(server, body) for _ in range(clients)]
        for writer in writers:
            writer.transport.abort()
        settled = await server.settled(descriptors)
        left = server.metric("infer_align_running_requests")
        ours = server.descriptors
    detail = f"{clients} clients left; {left:g} requests still run"
    return Outcome(
        "burst of disconnects: descriptors", ours, descriptors, "", settled and not left, detail
    )


async def full_table(scale: float) -> Outcome:
    """More connections than the process may open; it answers again once they are closed."""
    with served(FAKE) as server:
        before = await load(server, BODY, round(20 * scale), 1)
        limits = resource.prlimit(server.process_id, resource.RLIMIT_NOFILE)
        descriptors = server.descriptors
        limit = descriptors + 50
        resource.prlimit(server.process_id, resource.RLIMIT_NOFILE, (limit, limits[1]))
        writers = [await _open(server) for _ in range(200)]
        await asyncio.sleep(1.0)
        for writer in writers:
            writer.transport.abort()
        # Until the server has closed them, its event loop drops the connections that wait.
        settled = await server.settled(descriptors)
        after = await load(server, BODY, round(20 * scale), 1)
    detail = f"200 connections, {limit} descriptors; {after.failed} requests failed after"
    holds = settled and not after.failed
    ours, baseline = after.percentile(0.5), before.percentile(0.5)
    return Outcome("no descriptor left: p50 after", ours, baseline, "ms", holds, detail)


async def killed_worker(scale: float) -> Outcome:
    """One of two workers is killed under load, and is replaced."""
    clients = 8
    with served(FAKE.replace("[server]", "[server]\nworkers = 2")) as server:
        count = round(200 * scale)
        before = await load(server, BODY, count, clients)
        running = asyncio.create_task(load(server, BODY, count * 2, clients))
        await asyncio.sleep(0.1)
        server.workers[0].kill()
        during = await running
        after = await load(server, BODY, count, clients)
    # A client has one request under way, and its next one goes to a worker that lives.
    holds = during.failed <= clients and not before.failed and not after.failed
    detail = f"{len(during.statuses)} requests over the death, {during.failed} lost"
    ours, baseline = after.percentile(0.99), before.percentile(0.99)
    return Outcome("worker killed: p99 after", ours, baseline, "ms", holds, detail)


async def clock_steps(scale: float) -> Outcome:
    """Let the wall clock jump an hour forward and back; only the end of a key follows it."""
    name = "clock steps: p99"
    if not WallClock.is_possible():
        return Outcome(name, 0.0, 0.0, "ms", holds=True, detail="left out: no compiler for C")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        clock = WallClock(folder)
        keys = folder / "keys.toml"
        end = datetime.now(UTC) + timedelta(minutes=30)
        keys.write_text(_key("ann") + _key("rated") + _key("short") + f"expires = {end:%FT%TZ}\n")
        config = FAKE.replace("[server]", f'[server]\napi_keys_file = "{keys}"')
        config = config.replace("0.01", "0.001") + f"[limits]\nrequests_per_minute = {RATE}\n"
        server = stack.enter_context(served(config, clock.environment))
        count = round(40 * scale)
        before = await load(server, BODY, count, 1, "ann")
        start = monotonic()
        used = await load(server, BODY, RATE + 50, 16, "rated")
        during = Load([], [])
        short = []
        for seconds in (HOUR, 0, -HOUR, 0):
            clock.step(seconds)
            jumped = await load(server, BODY, count, 1, "ann")
            during.seconds.extend(jumped.seconds)
            during.statuses.extend(jumped.statuses)
            short += (await load(server, BODY, 1, 1, "short")).statuses
        after = await load(server, BODY, RATE, 16, "rated")
        refilled = (monotonic() - start) * RATE / 60
    # A step of the clock that counted would have filled the bucket.
    admitted = [*used.statuses, *after.statuses].count(200)
    holds = admitted <= RATE + refilled and not during.failed and short == [401, 200, 200, 200]
    detail = f"a key of 30 minutes: {short}; {admitted} requests at {RATE} per minute"
    ours, baseline = during.percentile(0.99), before.percentile(0.99)
    return Outcome(name, ours, baseline, "ms", holds, detail)


def _key(name: str) -> str:
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    return f'[[keys]]\nname = "{name}"\nsha256 = "{sha256}"\n'


async def _open(server: Server) -> asyncio.StreamWriter:
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    return writer


async def _send(server: Server, body: bytes, key: str = "") -> asyncio.StreamWriter:
    """Send a request, and leave its answer unread."""
    writer = await _open(server)
    writer.write(request_head(CHAT, len(body), f"Authorization: Bearer {key}") + body)
    await writer.drain()
    return writer


Scenario = Callable[[float], Awaitable[Outcome]]
SCENARIOS: dict[str, Scenario] = {
    "key-flood": key_flood,
    "head-of-line": head_of_line,
    "memory": memory_drift,
    "failover": failover,
    "slow-readers": slow_readers,
    "disconnects": disconnects,
    "descriptors": full_table,
    "killed-worker": killed_worker,
    "clock-steps": clock_steps,
    "full-disk": full_disk,
    "read-only-store": read_only_store,
}


def main() -> int:
    """Run the scenarios; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SCENARIOS, help="one scenario")
    parser.add_argument("--scale", type=float, default=1.0, help="of the load")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results")
    options = parser.parse_args()
    names = [options.only] if options.only else list(SCENARIOS)
    outcomes = [asyncio.run(SCENARIOS[name](options.scale)) for name in names]
    table = Table("scenario", "figure", "undisturbed", "unit", "holds", "detail")
    for each in outcomes:
        holds = "yes" if each.holds else "NO"
        figures = (f"{each.ours:.4g}", f"{each.baseline:.4g}")
        table.add_row(each.what, *figures, each.unit, holds, each.detail)
    OUT.print(table)
    if options.record:
        rows = [
            row(each.what, each.ours, each.ours, each.baseline, each.detail) for each in outcomes
        ]
        suffix = f"_{options.only.replace('-', '_')}" if options.only else ""
        record(
            f"scenarios{suffix}",
            baseline="the same server without the disturbance, in the same run",
            seed=None,
            rows=rows,
            setup={"no_seed": "nothing is random", "scale": options.scale},
        )
    return 0 if all(each.holds for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
