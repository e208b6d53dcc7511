"""The soak, short: nothing is left over, and what would be left over is seen."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record as written
from benchmarks.serving import soak
from benchmarks.serving.client import serving


@pytest.mark.slow
@pytest.mark.parametrize("target", ["fake", "upstream"])
def test_a_short_soak_leaves_nothing_over(target: str) -> None:
    with (
        soak.target(target, "fake", 0) as config,
        serving(
            "-m", "infer_align_server", "serve", str(config), "--set", "server.port={port}"
        ) as (port, pid),
    ):
        result = asyncio.run(soak.soak(port, pid, "fake", 8.0, 64))
    assert soak.faults(result, growth=40.0) == []
    assert result["answered"] > 100
    assert result["left"] > 10
    assert {200, 400, 404, 500} <= result["statuses"].keys()


CLEAN: dict[str, Any] = {
    "unanswered": 0,
    "broken": {},
    "before": {"tasks": 4.0, "descriptors": 14.0},
    "after": {"tasks": 4.0, "descriptors": 14.0},
    "memory_early": 70.0,
    "memory_late": 71.0,
}


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
def test_what_is_left_over_is_said(change: dict[str, Any], word: str) -> None:
    assert soak.faults(CLEAN, 8.0) == []
    (wrong,) = soak.faults({**CLEAN, **change}, 8.0)
    assert word in wrong


def test_what_is_written_down_is_a_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = {**CLEAN, "answered": 10, "left": 3, "memory_first": 60.0, "memory_last": 71.0}
    assert {row["what"]: row["value"] for row in soak.rows(result)}[
        "requests cancelled by their clients"
    ] == 3
    monkeypatch.setattr(written, "RESULTS", tmp_path)
    monkeypatch.setattr(written, "commit", lambda: "0123456789ab")
    path = written.record(
        "soak",
        baseline="the same process at the start",
        seed=0,
        rows=soak.rows(result),
        setup={"minutes": 30},
    )
    assert written.problems(path) == []


def test_a_client_that_gets_half_an_answer_notices() -> None:
    async def scenario(answer: bytes) -> int | None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await soak.exchange(port, soak.CHAT, {}, None)

    assert asyncio.run(scenario(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")) == 200
    with pytest.raises(ValueError, match="without its end"):
        asyncio.run(scenario(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\ndata:"))
    with pytest.raises(ValueError, match="599"):
        asyncio.run(scenario(b"HTTP/1.1 599 Odd\r\n\r\n"))
