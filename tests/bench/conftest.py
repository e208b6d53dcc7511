"""Servers to measure: ours over the fake engine, and endpoints of others' manners."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from infer_align_server import cli
from tests.server.conftest import config_file, serve

__all__ = ["config_file", "serve"]

# A reply repeats its prompt, a word per token; a candidate is as slow as its seed says: its times are known to the number.
FIRST, EACH, SPREAD = 0.06, 0.02, 3.0
ECHO = f"""
[engine]
kind = "fake"
replies = [{{text = "{{prompt}}", first_token_seconds = {FIRST}, seconds_per_token = {EACH}, spread = {SPREAD}}}]
[rewards.brevity]
kind = "rules"
words_weight = -1.0
[presets.four]
best_of_n = {{n = 4}}
"""
QUICK = '[engine]\nkind = "fake"\nreplies = [{text = "one two three"}]\n[rewards.r]\nkind = "rules"\nwords_weight = 1.0\n'
USAGE = {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 2}}

Answer = Callable[[dict[str, Any], int], Response]


class Peer:
    """An endpoint that answers request number i of a chat by `answer(body, i)`."""

    def __init__(self, answer: Answer, models: Response | None = None, scores: Any = None) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

        async def chat(request: Request) -> Response:
            self.bodies.append(await request.json())
            self.keys.append(request.headers.get("authorization"))
            return answer(self.bodies[-1], len(self.bodies) - 1)

        async def listed(_: Request) -> Response:
            return models or JSONResponse(
                {"object": "list", "data": [{"id": "tiny"}, {"id": "large"}]}
            )

        routes = [
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", listed),
        ]
        routes += [Route("/v1/align/score", scores, methods=["POST"])] if scores else []
        self._server = uvicorn.Server(
            uvicorn.Config(Starlette(routes=routes), port=0, log_config=None, access_log=False)
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}/v1"

    def end(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


@pytest.fixture
def peer() -> Iterator[Callable[..., Peer]]:
    """`peer(answer)`: a running one."""
    running: list[Peer] = []

    def make(answer: Answer, models: Response | None = None, scores: Any = None) -> Peer:
        running.append(Peer(answer, models, scores))
        return running[-1]

    yield make
    for one in running:
        one.end()


def events(*chunks: object, end: bool = True) -> StreamingResponse:
    """A stream of these; a number waits so many seconds."""

    async def sent() -> AsyncIterator[bytes]:
        for chunk in chunks:
            if isinstance(chunk, float):
                await asyncio.sleep(chunk)
            else:
                yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
        if end:
            yield b"data: [DONE]\n\n"

    return StreamingResponse(sent(), media_type="text/event-stream")


def piece(content: str | None, finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    """One chunk."""
    delta = {"content": content} if content is not None else {"role": "assistant", "content": ""}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}], **more}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "out.json"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`code, out, err = bench("--base-url", ...)`: `infer-align bench serve`, its spaces and line breaks as single spaces."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["bench", "serve", *map(str, arguments)])
        said = capsys.readouterr()
        return code, " ".join(said.out.split()), " ".join(said.err.split())

    return run
