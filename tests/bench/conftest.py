"""Servers to measure: ours over the fake engine, and endpoints that behave like other servers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from infer_align_server import cli
from tests.server.conftest import config_file, serve
from tests.server.processes import Running
from tests.threaded_server import ThreadedServer

__all__ = ["config_file", "serve"]

# The delays of a reply that repeats its prompt, one token per word. The seed of a candidate
# multiplies its delays by a known factor.
FIRST = 0.06
EACH = 0.02
SPREAD = 3.0
REPLY = (
    f'{{text = "{{prompt}}", first_token_seconds = {FIRST}, '
    f"seconds_per_token = {EACH}, spread = {SPREAD}}}"
)
ECHO = f"""
[engine]
kind = "fake"
replies = [{REPLY}]
[rewards.brevity]
kind = "rules"
words_weight = -1.0
[presets.four]
best_of_n = {{n = 4}}
"""
QUICK = """
[engine]
kind = "fake"
replies = [{text = "one two three"}]
[rewards.r]
kind = "rules"
words_weight = 1.0
"""
USAGE = {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 2}}
# Longest wait for an event that must happen, such as the first requests of a new process.
PATIENT_SECONDS = 100

Reply = Callable[[dict[str, Any], int], Response]
CommandResult = tuple[int, str, str]


class Peer:
    """An endpoint that answers chat request number i with `reply(body, i)`."""

    def __init__(self, reply: Reply, models: Response | None = None, scores: Any = None) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

        async def chat(request: Request) -> Response:
            self.bodies.append(await request.json())
            self.keys.append(request.headers.get("authorization"))
            return reply(self.bodies[-1], len(self.bodies) - 1)

        async def list_models(_: Request) -> Response:
            data = [{"id": "tiny"}, {"id": "large"}]
            return models or JSONResponse({"object": "list", "data": data})

        routes = [
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", list_models),
        ]
        if scores:
            routes.append(Route("/v1/align/score", scores, methods=["POST"]))
        app = Starlette(routes=routes)
        self._server = ThreadedServer(app, timeout_graceful_shutdown=5)
        self.url = f"http://127.0.0.1:{self._server.port}/v1"

    def end(self) -> None:
        self._server.end()


@pytest.fixture
def peer() -> Iterator[Callable[..., Peer]]:
    """Start an endpoint with `peer(reply)`."""
    running: list[Peer] = []

    def start(reply: Reply, models: Response | None = None, scores: Any = None) -> Peer:
        running.append(Peer(reply, models, scores))
        return running[-1]

    yield start
    for endpoint in running:
        endpoint.end()


def events(*chunks: object, end: bool = True) -> StreamingResponse:
    """Stream the chunks; a float is a pause in seconds."""

    async def stream() -> AsyncIterator[bytes]:
        for chunk in chunks:
            if isinstance(chunk, float):
                await asyncio.sleep(chunk)
            else:
                yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
        if end:
            yield b"data: [DONE]\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream")


def piece(content: str | None, finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
    """Return one chunk; without content, the first one with the role only."""
    delta = {"content": content}
    if content is None:
        delta = {"role": "assistant", "content": ""}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}], **fields}


@pytest.fixture
def out_path(tmp_path: Path) -> Path:
    return tmp_path / "out.json"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def words(text: str) -> str:
    """Join the lines of a terminal's output."""
    return " ".join(text.split())


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., CommandResult]:
    """Run `infer-align bench serve`: `code, out, err = bench("--base-url", url)`."""

    def run(*arguments: object) -> CommandResult:
        code = cli.main(["bench", "serve", *map(str, arguments)])
        output = capsys.readouterr()
        return code, words(output.out), words(output.err)

    return run


def bench_process(*arguments: object, **variables: str) -> Running:
    """Run `infer-align bench` in a process of its own."""
    return Running("bench", *map(str, arguments), **variables)
