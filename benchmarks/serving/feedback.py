"""Measure how long POST /v1/align/feedback takes beside answering.

One server answers chat completions all the time. Beside them, single requests are timed in
alternating rounds: feedback, and as the baseline a plain chat completion of one word. Both pay for
HTTP, JSON and the wait for the other requests. Feedback adds the scoring, the write, and the
weights that it returns.

Other programs on the machine lengthen the wait. So each row also has the CPU time that the server
spends on one request, measured without the load: `cpu_ms`, and `baseline_cpu_ms` for plain ones.

    python benchmarks/serving/feedback.py [--rounds 5] [--no-record]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.record import record
from benchmarks.serving.answers import WrongAnswerError, check_completions
from benchmarks.serving.client import DEMO, Connection, serving
from benchmarks.serving.rows import Row, print_rows, row
from infer_align.profiles.schema import CHOICES, PROFILES
from infer_align.profiles.store import ProfileStore

OWNER = "public"
PROFILES_BEFORE = 10_000
CHOICES_EACH = 3
# As many as a profile is read with; see `infer_align.profiles.store`.
LONG_PROFILE = 1000
# Clients that are answered all the time, and their pause between two requests.
LOAD = 2
PAUSE_SECONDS = 0.02
REQUESTS = 100
CPU_REQUESTS = 200
WARMUP = 20
TARGET = "at most 5 at the median"
URL_VARIABLE = "FEEDBACK_BENCHMARK_STORE"
CHAT = "/v1/chat/completions"
FEEDBACK = "/v1/align/feedback"
MESSAGES = [{"role": "user", "content": "What do owls eat?"}]
CONFIG = f"""
[server]
default_rewards = {{ brief = 1.0, direct = 0.0, plain = 0.0 }}
[profiles]
store_env = "{URL_VARIABLE}"
spreads = {{ brief = 0.3, direct = 0.5, plain = 0.5 }}
ENGINE
[rewards.brief]
kind = "rules"
words_weight = -0.01
[rewards.direct]
kind = "rules"
avoid = ["as an AI", "certainly"]
[rewards.plain]
kind = "rules"
avoid = ["moreover", "hence"]
"""
ENGINES = {
    "script": '[engine]\nkind = "fake"\nreplies = [{text = "Mice."}]\n',
    "demo": '[engine]\nkind = "transformers"\nmodel = "demo"\nthreads = 1\n',
}
OUT = Console()


class Case(NamedTuple):
    """A store, and the profile that feedback goes to."""

    name: str
    profiles: int  # in the store before
    choices: int  # of the profile; 0: each feedback makes a profile


CASES = (
    Case("fresh store", 0, 0),
    Case("10,000 profiles", PROFILES_BEFORE, 0),
    Case("10,000 profiles, one with 1,000 choices", PROFILES_BEFORE, LONG_PROFILE),
)


def choice_row(profile_id: str, number: int) -> dict[str, Any]:
    """Return a stored choice."""
    random = np.random.default_rng(number)
    differences = dict(zip(("brief", "direct", "plain"), random.normal(size=3), strict=True))
    return {
        "owner": OWNER,
        "profile_id": profile_id,
        "created_at": float(number),
        "differences": differences,
        "chosen_hash": "a" * 64,
        "rejected_hash": "b" * 64,
        "messages_hash": "c" * 64,
    }


async def fill(url: str, case: Case) -> None:
    """Put the profiles of a case into an empty store."""
    store = ProfileStore(url)
    # The tables are made at the first use.
    await store.get(OWNER, "none")
    await store.close()
    names = [f"before{i}" for i in range(case.profiles)]
    rows = [choice_row(name, i) for name in names for i in range(CHOICES_EACH)]
    if case.choices:
        names.append("long")
        rows += [choice_row("long", i) for i in range(case.choices)]
    if not names:
        return
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        profiles = [{"owner": OWNER, "id": name, "created_at": 0.0} for name in names]
        await connection.execute(PROFILES.insert(), profiles)
        await connection.execute(CHOICES.insert(), rows)
    await engine.dispose()


async def answer_all_the_time(port: int, stop: asyncio.Event) -> None:
    """Ask for one chat completion after another."""
    body = json.dumps({"messages": MESSAGES, "max_tokens": 16, "seed": 1}).encode()
    connection = Connection(port)
    while not stop.is_set():
        await connection.post(CHAT, body)
        await asyncio.sleep(PAUSE_SECONDS)
    connection.close()


async def timed(connection: Connection, path: str, bodies: Sequence[bytes]) -> list[float]:
    """Send requests one after the other; return the milliseconds of each."""
    milliseconds: list[float] = []
    answers: list[dict[str, Any]] = []
    for body in bodies:
        start = perf_counter()
        answer = await connection.post(path, body)
        milliseconds.append(1e3 * (perf_counter() - start))
        answers.append(answer)
    for body, answer in zip(bodies, answers, strict=True):
        if path == CHAT:
            check_completions(json.loads(body), [answer])
        elif answer["added"] != 1 or answer["failed"]:
            raise WrongAnswerError(f"a choice was not stored with all its scores: {answer}")
    return milliseconds


async def measure(port: int, case: Case, rounds: int) -> tuple[list[float], list[float]]:
    """Return the milliseconds of each feedback and of each plain request."""
    stop = asyncio.Event()
    load = [asyncio.create_task(answer_all_the_time(port, stop)) for _ in range(LOAD)]
    plain_body = json.dumps({"messages": MESSAGES, "max_tokens": 1}).encode()
    connection = Connection(port)
    numbers = count()
    ours: list[float] = []
    plain: list[float] = []
    for i in range(rounds + 1):
        requests = REQUESTS if i else WARMUP
        bodies = [feedback_body(case, next(numbers)) for _ in range(requests)]
        ours_now = await timed(connection, FEEDBACK, bodies)
        plain_now = await timed(connection, CHAT, [plain_body] * requests)
        if i:
            ours += ours_now
            plain += plain_now
    stop.set()
    await asyncio.gather(*load)
    connection.close()
    return ours, plain


async def measure_cpu(port: int, pid: int, case: Case) -> tuple[float, float]:
    """Return the milliseconds of CPU time of one feedback and of one plain request."""
    connection = Connection(port)
    # Numbers that `measure` has not used.
    bodies = [feedback_body(case, 1_000_000 + i) for i in range(CPU_REQUESTS)]
    plain_body = json.dumps({"messages": MESSAGES, "max_tokens": 1}).encode()
    milliseconds: list[float] = []
    for path, sent in ((FEEDBACK, bodies), (CHAT, [plain_body] * CPU_REQUESTS)):
        start = cpu_seconds(pid)
        await timed(connection, path, sent)
        milliseconds.append(1e3 * (cpu_seconds(pid) - start) / CPU_REQUESTS)
    connection.close()
    return milliseconds[0], milliseconds[1]


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used."""
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    # Fields 14 and 15: in user mode and in the kernel.
    return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")


def feedback_body(case: Case, number: int) -> bytes:
    """Return a choice between two answers that were never scored before."""
    body = {
        "profile": "long" if case.choices else f"u{number}",
        "messages": MESSAGES,
        "candidates": [f"Mice, {number} of them.", f"Certainly: owls eat mice, {number} a year."],
        "chosen": number % 2,
    }
    return json.dumps(body).encode()


def rows_of(case: Case, engine: str, url: str, rounds: int, folder: Path) -> list[Row]:
    """Measure one case with one engine."""
    asyncio.run(fill(url, case))
    path = folder / "infer-align.toml"
    path.write_text(CONFIG.replace("ENGINE", ENGINES[engine]))
    os.environ[URL_VARIABLE] = url
    arguments = (*DEMO[:3], str(path), *DEMO[3:])
    with serving(*arguments) as (port, pid):
        ours, plain = asyncio.run(measure(port, case, rounds))
        cpu, plain_cpu = asyncio.run(measure_cpu(port, pid, case))
    rows: list[Row] = []
    for name, share, target in (("p50", 50, TARGET if engine == "script" else ""), ("p95", 95, "")):
        value = float(np.percentile(ours, share))
        baseline = float(np.percentile(plain, share))
        figure = row(f"{case.name}, {engine} engine, {name}", value, value, baseline, target)
        rows.append({**figure, "cpu_ms": cpu, "baseline_cpu_ms": plain_cpu})
    return rows


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    rows: list[Row] = []
    for engine in ENGINES:
        for case in CASES:
            with tempfile.TemporaryDirectory() as folder:
                url = f"sqlite:///{folder}/profiles.db"
                rows += rows_of(case, engine, url, options.rounds, Path(folder))
    print_rows(rows, OUT, ("feedback", "ms", "ms", "plain request, ms", "target"))
    for item in rows:
        OUT.print(f"{item['what']}: {item['cpu_ms']:.2f} ms of CPU time")
    if options.no_record:
        return
    setup = {
        "rounds": options.rounds,
        "requests_per_round": REQUESTS,
        "answering": f"{LOAD} clients; each pauses {PAUSE_SECONDS} s between two completions",
        "store": "SQLite, WAL, synchronous = NORMAL",
        "rewards": "three rules; new answers each time",
        "unit": "milliseconds over HTTP, one feedback at a time",
        "note": "the machine ran other programs; compare figures of one row only",
    }
    path = record(
        "feedback",
        baseline="a plain chat completion of one token, in alternating rounds beside the same load",
        seed=0,
        rows=rows,
        setup=setup,
    )
    OUT.print(f"wrote {path}")


if __name__ == "__main__":
    main()
