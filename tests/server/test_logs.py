"""The lines of requests: written at once, and never in the way of an answer."""

from __future__ import annotations

import asyncio
import io
import json

import pytest

from infer_align_server.logs import REDACTED, AccessLog, JsonFormatter

pytestmark = pytest.mark.anyio


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, _: str) -> int:
        raise OSError(28, "No space left on device")


async def one_round() -> None:
    """Let the event loop run what waits."""
    await asyncio.sleep(0)


async def test_the_lines_of_one_round_are_in_order_and_without_secrets() -> None:
    text = io.StringIO()
    log = AccessLog()
    log.open(text, JsonFormatter(["the-key"], worker=7))
    log.write({"route": "/a", "model": "the-key"})
    log.write({"route": "/b", "model": "bearer abc"})
    await one_round()
    first, second = map(json.loads, text.getvalue().splitlines())
    assert (first["route"], first["model"], first["worker"]) == ("/a", REDACTED, 7)
    assert (second["route"], second["model"]) == ("/b", f"bearer {REDACTED}")
    assert first["logger"] == "infer_align.access"


async def test_a_log_that_cannot_be_written_stops_no_request() -> None:
    log = AccessLog()
    log.open(Full(), JsonFormatter())
    log.write({"route": "/a"})
    await one_round()
    text = io.StringIO()
    log.open(text, JsonFormatter())
    log.write({"route": "/b"})
    await one_round()
    assert json.loads(text.getvalue())["route"] == "/b"


async def test_a_closed_log_writes_nothing() -> None:
    text = io.StringIO()
    log = AccessLog()
    log.open(text, JsonFormatter())
    log.close()
    log.write({"route": "/a"})
    await one_round()
    assert not text.getvalue()
