"""The load of the comparison of gateways, on connections that a server keeps or closes."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.serving.gateways import _load

KEPT = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
CLOSED = b"HTTP/1.1 200 OK\r\nConnection: close\r\ncontent-length: 2\r\n\r\n{}"
FAILED = b"HTTP/1.1 503 Busy\r\ncontent-length: 2\r\n\r\n{}"


class Scripted(asyncio.Protocol):
    """A server that gives the same answer to each request."""

    def __init__(self, answer: bytes, connections: list[int]) -> None:
        self._answer = answer
        connections.append(1)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer; requests are too small to come in parts."""
        self._transport.write(self._answer)
        if b"close" in self._answer:
            self._transport.close()


async def load_of(answer: bytes) -> tuple[int, int]:
    """Return the numbers of answers and of connections of six requests, two at a time."""
    connections: list[int] = []
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Scripted(answer, connections), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        latencies, seconds = await _load(port, 2, 6)
    assert all(0 < latency <= seconds for latency in latencies)
    return len(latencies), len(connections)


@pytest.mark.parametrize(("answer", "connections"), [(KEPT, 2), (CLOSED, 6)])
def test_every_request_is_answered(answer: bytes, connections: int) -> None:
    assert asyncio.run(load_of(answer)) == (6, connections)


def test_a_failed_request_ends_the_run() -> None:
    with pytest.raises(RuntimeError, match="503 Busy"):
        asyncio.run(load_of(FAILED))


def test_a_server_that_does_not_listen_ends_the_run() -> None:
    with pytest.raises(ConnectionRefusedError, match="Connect call failed"):
        asyncio.run(_load(1, 1, 1))
