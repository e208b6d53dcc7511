"""Serve one scripted chat completion, each after the same delay, at a small cost per request.

    python benchmarks/serving/delayed.py PORT [--seconds 0.02]

uvicorn does not fit: it takes longer per request than the gateways that are compared in front of it
may add.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import cast

import uvloop

MODEL = "delayed"
COMPLETION = {
    "id": "chatcmpl-0",
    "object": "chat.completion",
    "created": 0,
    "model": MODEL,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "an answer of some length, as models give"},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 12, "completion_tokens": 9, "total_tokens": 21},
}
MODELS = {"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 4096}]}


def _answer(value: object) -> bytes:
    content = json.dumps(value).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(content) + content


class Delayed(asyncio.Protocol):
    """One connection. Each request waits for its delay; none is pipelined."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._received = b""
        self._models = _answer(MODELS)
        self._completion = _answer(COMPLETION)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport."""
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Answer once a request is complete."""
        self._received += data
        head, separator, content = self._received.partition(b"\r\n\r\n")
        if not separator or len(content) < _content_length(head):
            return
        self._received = b""
        if head.startswith(b"GET"):
            self._transport.write(self._models)
            return
        loop = asyncio.get_running_loop()
        loop.call_later(self._seconds, self._transport.write, self._completion)


def _content_length(head: bytes) -> int:
    lower = head.lower()
    start = lower.find(b"content-length:")
    return 0 if start < 0 else int(lower[start + 15 :].split(b"\r\n", 1)[0])


async def _serve(port: int, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Delayed(seconds), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--seconds", type=float, default=0.02)
    options = parser.parse_args()
    uvloop.run(_serve(options.port, options.seconds))
