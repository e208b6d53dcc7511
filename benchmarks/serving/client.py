"""A minimal load generator, so that the client is not what is measured.

It uses HTTP/1.1 with kept-alive connections over asyncio streams. aiohttp and httpx do not fit:
they take longer per request than the server adds.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter, sleep
from typing import Any

from benchmarks.serving.answers import check_completions
from benchmarks.serving.ports import free_port

# Arguments of Python that run our server with the embedded demo; see `serving`.
DEMO = ("-m", "infer_align_server", "serve", "--set", "server.port={port}")
POLL_SECONDS = 0.1
SHUTDOWN_SECONDS = 30


class Connection:
    """One kept-alive connection to a port of this machine."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: bytes) -> dict[str, Any]:
        """Send one request and return its JSON answer.

        Raises:
            RuntimeError: the status is not 200.
        """
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self._streams
        writer.write(request_head(path, len(body)) + body)
        header = await reader.readuntil(b"\r\n\r\n")
        content = await reader.readexactly(_content_length(header))
        if not header.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(content.decode())
        answer: dict[str, Any] = json.loads(content)
        return answer

    def close(self) -> None:
        """Close the connection, also in the middle of a request."""
        if self._streams:
            _, writer = self._streams
            writer.transport.abort()
        self._streams = None


def request_head(path: str, length: int, *headers: str) -> bytes:
    """Return the head of a POST request with a JSON body of `length` bytes."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        *headers,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _content_length(header: bytes) -> int:
    for line in header.lower().split(b"\r\n"):
        if line.startswith(b"content-length"):
            return int(line.split(b":")[1])
    raise RuntimeError(f"the answer has no Content-Length: {header.decode(errors='replace')}")


async def closed_loop(
    port: int, body: dict[str, Any], concurrency: int, requests: int
) -> tuple[list[float], float]:
    """Send `requests` requests, `concurrency` at a time.

    Returns:
        The seconds of each request, and of all requests together.

    Raises:
        RuntimeError: a status is not 200, or an answer is wrong.
    """
    encoded = json.dumps(body).encode()
    remaining = iter(range(requests))
    latencies = []
    answers = []

    async def worker() -> None:
        connection = Connection(port)
        for _ in remaining:
            started = perf_counter()
            answer = await connection.post("/v1/chat/completions", encoded)
            latencies.append(perf_counter() - started)
            answers.append(answer)
        connection.close()

    started = perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    seconds = perf_counter() - started
    check_completions(body, answers)
    return latencies, seconds


@contextmanager
def serving(
    *command: str,
    ready: str = "/ready",
    seconds: int = 60,
    environment: Mapping[str, str] | None = None,
) -> Iterator[tuple[int, int]]:
    """Run a server process, and yield its port and process id once it is ready.

    Args:
        command: arguments of Python; `{port}` stands for a free port.
        ready: path that answers when the server is ready.
        seconds: to wait for it.
        environment: further variables of the process.
    """
    port = free_port()
    arguments = [part.format(port=port) for part in command]
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, **(environment or {})},
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}{ready}", process, seconds)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(SHUTDOWN_SECONDS)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], seconds: int) -> None:
    for _ in range(round(seconds / POLL_SECONDS)):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            sleep(POLL_SECONDS)
    raise RuntimeError(f"the server was not ready within {seconds} s")
