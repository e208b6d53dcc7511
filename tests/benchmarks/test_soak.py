"""A short soak leaves nothing over, and a soak that leaves something over is noticed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record as recording
from benchmarks.serving import soak
from benchmarks.serving.client import serving
from benchmarks.serving.soak_target import target_config

pytestmark = pytest.mark.slow

CLEAN: dict[str, Any] = {
    "answered": 10,
    "left": 3,
    "unanswered": 0,
    "broken": {},
    "before": {"tasks": 4.0, "descriptors": 14.0},
    "after": {"tasks": 4.0, "descriptors": 14.0},
    "memory_early": 70.0,
    "memory_late": 71.0,
    "memory_first": 60.0,
    "memory_last": 71.0,
}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["fake", "upstream"])
def test_a_short_soak_leaves_nothing_over(target: str) -> None:
    command = ("-m", "infer_align_server", "serve")
    port_setting = ("--set", "server.port={port}")
    with (
        target_config(target, "fake", 0) as config,
        serving(*command, str(config), *port_setting) as (port, process_id),
    ):
        # A number of answers bounds the run, so that a slow machine sends enough requests too.
        server = soak.Server(port, process_id, "fake", seconds=2.0, min_answers=600)
        result = asyncio.run(soak.run_soak(server, concurrency=64))
    assert soak.faults(result, growth=40.0) == []
    assert result["answered"] >= 600
    assert result["left"] > 10
    assert {200, 400, 404, 500} <= result["statuses"].keys()


def test_a_clean_result_has_no_faults() -> None:
    assert soak.faults(CLEAN, 8.0) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"after": {"tasks": 5.0, "descriptors": 14.0}}, "tasks"),
        ({"after": {"tasks": 4.0, "descriptors": 15.0}}, "descriptors"),
        ({"unanswered": 1}, "unanswered"),
        ({"broken": {"ValueError: status 599": 1}}, "broken"),
        ({"memory_late": 90.0}, "memory"),
    ],
)
def test_a_fault_is_described(change: dict[str, Any], word: str) -> None:
    (message,) = soak.faults({**CLEAN, **change}, 8.0)
    assert word in message


def test_the_rows_are_a_valid_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = soak.make_rows(CLEAN)
    values = {row["what"]: row["value"] for row in rows}
    assert values["requests cancelled by their clients"] == 3
    monkeypatch.setattr(recording, "RESULTS", tmp_path)
    monkeypatch.setattr(recording, "commit", lambda: "0123456789ab")
    path = recording.record(
        "soak",
        baseline="the same process at the start",
        seed=0,
        rows=rows,
        setup={"minutes": 30},
    )
    assert recording.problems(path) == []


def status_of(answer: bytes) -> int | None:
    """Send a request to a server that answers with these bytes."""

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async def scenario() -> int | None:
        async with await asyncio.start_server(reply, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await soak.exchange(port, soak.CHAT, {}, None)

    return asyncio.run(scenario())


def test_a_complete_answer_has_a_status() -> None:
    assert status_of(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}") == 200


def test_an_incomplete_answer_is_noticed() -> None:
    with pytest.raises(ValueError, match="without its last chunk"):
        status_of(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\ndata:")


def test_an_unexpected_status_is_noticed() -> None:
    with pytest.raises(ValueError, match="599"):
        status_of(b"HTTP/1.1 599 Odd\r\n\r\n")
