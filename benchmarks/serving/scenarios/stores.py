"""Scenarios of the store of profiles: a disk that is full, and a store that cannot be written."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.serving.scenarios.server import CHAT, MESSAGES, Outcome, Server, load, served

STORE = "SCENARIO_STORE"
FEEDBACK = "/v1/align/feedback"
CONFIG = f"""
[engine]
kind = "fake"
replies = [{{text = "one two three four five six", seconds_per_token = 0.01}}]
[rewards.brief]
kind = "rules"
words_weight = -1.0
[profiles]
store_env = "{STORE}"
spreads = {{ brief = 2.0 }}
[server]
default_rewards = {{ brief = 1.0 }}
log_level = "error"
"""
# Answers by a profile of the store.
NAMED = {"messages": MESSAGES, "align": {"profile": {"id": "ann"}}}
CHOICE = {"profile": "ann", "messages": MESSAGES, "candidates": ["a b", "a b c"], "chosen": 0}
# Bytes to which the files of a process are limited: less than the store has.
FULL = 4096


async def full_disk(scale: float) -> Outcome:
    """Let no file of the server grow for a while: answers go on, and no choice is lost."""
    count = round(40 * scale)
    with tempfile.TemporaryDirectory() as folder:
        store = {STORE: f"sqlite:///{folder}/profiles.db"}
        with served(CONFIG, store) as server:
            kept = await _choices(server, count)
            before = await load(server, NAMED, count, 4)
            limits = resource.prlimit(server.process_id, resource.RLIMIT_FSIZE)
            resource.prlimit(server.process_id, resource.RLIMIT_FSIZE, (FULL, limits[1]))
            refused = await _choices(server, count)
            during = await load(server, NAMED, count, 4)
            resource.prlimit(server.process_id, resource.RLIMIT_FSIZE, limits)
            kept += await _choices(server, count)
            stored = await asyncio.to_thread(_stored, server)
    # What was acknowledged is stored, and what was refused is not.
    is_kept = kept.count(200) == stored == 2 * count
    holds = is_kept and refused == [503] * count and not during.failed
    detail = f"{count} choices refused, {during.failed} answers failed; {stored} choices stored"
    ours, baseline = during.percentile(0.99), before.percentile(0.99)
    return Outcome("full disk: p99 of answers", ours, baseline, "ms", holds, detail)


async def read_only_store(scale: float) -> Outcome:
    """Serve with a store that can be read alone: answers use it, and choices are refused."""
    count = round(40 * scale)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profiles.db"
        with served(CONFIG, {STORE: f"sqlite:///{file}"}) as server:
            kept = await _choices(server, count)
            before = await load(server, NAMED, count, 4)
        with served(CONFIG, {STORE: f"sqlite:///file:{file}?mode=ro&uri=true"}) as server:
            refused = await _choices(server, count)
            during = await load(server, NAMED, count, 4)
            stored = await asyncio.to_thread(_stored, server)
    is_kept = kept.count(200) == stored == count
    holds = is_kept and refused == [503] * count and not during.failed
    detail = f"{count} choices refused, {during.failed} answers failed; {stored} choices stored"
    ours, baseline = during.percentile(0.99), before.percentile(0.99)
    return Outcome("read-only store: p99 of answers", ours, baseline, "ms", holds, detail)


async def _choices(server: Server, count: int) -> list[int]:
    """Send choices one after the other; return the status of each."""
    sent = []
    for _ in range(count):
        # A request that is sent twice counts once, so each has an id of its own.
        choice = {**CHOICE, "request_id": os.urandom(8).hex()}
        status, _ = await asyncio.to_thread(_post, server, FEEDBACK, choice)
        sent.append(status)
    return sent


def _stored(server: Server) -> int:
    """Return the number of choices in the profile, as an answer reports it."""
    _, answer = _post(server, CHAT, NAMED)
    return int(answer["align"]["profile"]["choices"])


def _post(server: Server, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Return the status and the JSON of the answer to a request."""
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
