"""The lines of requests: written at once, and never in the way of an answer."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import signal

import pytest
import uvicorn

from infer_align.config import config
from infer_align_server.app import create_app
from infer_align_server.logs import (
    REDACTED,
    AccessLog,
    JsonFormatter,
    RequestIdFilter,
    access_fields,
)
from infer_align_server.serve import DrainingServer

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


async def test_a_drain_that_interrupts_a_request_does_not_have_its_id(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    caplog.handler.addFilter(RequestIdFilter())
    app = create_app(config.load(None, ["engine.kind=fake", "rewards={}", "values={}"]))
    server = DrainingServer(uvicorn.Config(app), app.state.service)
    token = access_fields.set({"request_id": "interrupted"})
    logging.getLogger("infer_align").info("beside the signal")
    server.handle_exit(signal.SIGTERM, None)
    access_fields.reset(token)
    await one_round()
    ids = {record.message: getattr(record, "request_id", None) for record in caplog.records}
    assert ids["beside the signal"] == "interrupted"
    assert ids["drain started"] is None
