"""The least a load generator can be: keep-alive HTTP/1.1 over asyncio streams, so that the client is not what is measured."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter, sleep
from typing import Any


class Connection:
    """One kept-alive connection."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: bytes) -> dict[str, Any]:
        """One request; -> the JSON answer, which must be a 200."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self._streams
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        header = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1])
            for line in header.lower().split(b"\r\n")
            if line.startswith(b"content-length")
        )
        content = await reader.readexactly(length)
        if not header.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(content.decode())
        answer: dict[str, Any] = json.loads(content)
        return answer

    def close(self) -> None:
        """Hang up, also in the middle of a request."""
        if self._streams:
            self._streams[1].transport.abort()
        self._streams = None


async def closed_loop(
    port: int, body: dict[str, Any], concurrency: int, requests: int
) -> tuple[list[float], float]:
    """`requests` in all, `concurrency` at a time; -> seconds of each, and of all together."""
    encoded, left, latencies = json.dumps(body).encode(), iter(range(requests)), []

    async def worker() -> None:
        connection = Connection(port)
        for _ in left:
            started = perf_counter()
            await connection.post("/v1/chat/completions", encoded)
            latencies.append(perf_counter() - started)
        connection.close()

    started = perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return latencies, perf_counter() - started


@contextmanager
def serving(*command: str, ready: str = "/ready", seconds: int = 60) -> Iterator[tuple[int, int]]:
    """A server process with `{port}` filled in; -> its port and process id, once it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, *(part.format(port=port) for part in command)],
        env=os.environ,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait(f"http://127.0.0.1:{port}{ready}", process, seconds)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(30)


def _wait(url: str, process: subprocess.Popen[bytes], seconds: int) -> None:
    for _ in range(10 * seconds):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            sleep(0.1)
    raise RuntimeError("the server did not become ready")
