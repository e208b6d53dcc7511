"""Raw sockets: invalid, ambiguous and oversized requests are refused; none hides another one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from typing import Any

import pytest
import uvicorn

from infer_align_server.wire.protocol import MAX_HEAD_BYTES, BoundedProtocol

BODY = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
SMUGGLED = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


def talk(live: Any, *pieces: bytes, pause: float = 0.0, answers: int = 99) -> bytes:
    """Send bytes; read until the server closes or has started a number of responses."""
    received = b""
    with socket.create_connection(("127.0.0.1", live.port), timeout=60) as raw:
        try:
            for piece in pieces:
                raw.sendall(piece)
                time.sleep(pause)
            while len(statuses(received)) < answers and (chunk := raw.recv(65536)):
                received += chunk
        except OSError:  # refused in the middle of it
            pass
    return received


def statuses(answer: bytes) -> list[int]:
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


AMBIGUOUS = {
    "length and chunks": b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 0\r\nContent-Length: 5\r\n\r\n",
    "lengths in one": b"Content-Length: 0, 5\r\n\r\n",
    "signed length": b"Content-Length: +0\r\n\r\n",
    "negative length": b"Content-Length: -1\r\n\r\n",
    "hexadecimal length": b"Content-Length: 0x0\r\n\r\n",
    "chunks twice": b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "unknown coding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "coding after chunks": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "space before the colon": b"Content-Length : 0\r\n\r\n",
    "compressed chunks": b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "two codings": b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two hosts": b"Host: y\r\nContent-Length: 0\r\n\r\n",
    "the host twice": b"HOST: x\r\nContent-Length: 0\r\n\r\n",
    "bad chunk size": b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
    "huge chunk size": b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n\r\n",
    "NUL in a value": b"X-A: a\x00b\r\nContent-Length: 0\r\n\r\n",
    "bare carriage return": b"X-A: a\rContent-Length: 0\r\n\r\n",
    "nameless": b": a\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("head", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_nothing_is_smuggled_behind_an_ambiguous_request(numbers: Any, head: bytes) -> None:
    before = numbers.engine.sampled
    answer = talk(numbers, HEAD + head + SMUGGLED)
    assert statuses(answer) == [400] or statuses(answer) == [400, 400], answer
    assert numbers.idle()
    assert numbers.engine.sampled == before
    assert b"content-type: application/json" in answer
    assert b'{"error":{"message":' in answer


@pytest.mark.parametrize(
    "text",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"\xff" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
    ],
)
def test_bytes_that_are_not_http_are_400(numbers: Any, text: bytes) -> None:
    answer = talk(numbers, text)
    assert statuses(answer) == [400]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


REFUSED_HEADS = {
    b"GET /health HTTP/1.1\r\n\r\n": "it has no Host header; send one.",
    b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n": "more than one Host header; send one.",
    HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n": "'gzip, chunked' is not allowed; send",
}


@pytest.mark.parametrize(("head", "reason"), REFUSED_HEADS.items(), ids=REFUSED_HEADS.values())
def test_a_head_that_can_be_read_in_two_ways_is_told_why(
    numbers: Any, head: bytes, reason: str
) -> None:
    answer = talk(numbers, head)
    assert statuses(answer) == [400]
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "invalid_http"
    assert reason in error["message"]


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.0\r\n\r\n",  # as some load balancers ask
        b"GET /health HTTP/1.1\r\nHost:\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: [::1]:8000\r\n\r\n",
        HEAD + b"Transfer-Encoding: Chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
    ],
)
def test_a_head_with_at_most_one_meaning_is_answered(numbers: Any, head: bytes) -> None:
    assert statuses(talk(numbers, head, answers=1)) == [200]


OFFERS = {
    "HTTP/2": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n",
    "WebSocket": b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
    "several": b"Upgrade: a/1, b/2\r\nConnection: keep-alive, upgrade\r\nUpgrade: c\r\n",
}
LENGTH = b"Content-Length: %d\r\n\r\n" % len(BODY)
CHUNKS = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
def test_an_offer_of_another_protocol_is_not_accepted(numbers: Any, offer: bytes) -> None:
    whole = HEAD + offer + LENGTH + BODY
    assert statuses(talk(numbers, whole, answers=1)) == [200]
    assert statuses(talk(numbers, HEAD + offer + CHUNKS, answers=1)) == [200]
    # The connection goes on, with and without an offer, and however the bytes arrive.
    assert statuses(talk(numbers, whole + SMUGGLED + whole, answers=3)) == [200] * 3
    many = (b"GET /health HTTP/1.1\r\nHost: x\r\n" + offer + b"\r\n") * 1500
    assert statuses(talk(numbers, many, answers=1500)) == [200] * 1500
    halves = (whole[:90], whole[90:-20], whole[-20:] + SMUGGLED)
    assert statuses(talk(numbers, *halves, pause=0.05, answers=2)) == [200] * 2
    assert statuses(
        talk(numbers, b"GET / HTTP/1.1\r\nHost: x\r\n" + offer + b"\r\n", answers=1)
    ) == [200]


def test_a_head_behind_a_large_body_is_not_too_large(numbers: Any) -> None:
    large = b" " * 100_000 + BODY
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(large) + large
    pieces = (whole + SMUGGLED[:20], SMUGGLED[20:])
    assert statuses(talk(numbers, *pieces, pause=0.1, answers=2)) == [200] * 2


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
def test_the_body_behind_an_offer_is_no_request(numbers: Any, offer: bytes) -> None:
    before = numbers.engine.sampled
    head = HEAD + offer + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED)
    last = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert statuses(talk(numbers, head, SMUGGLED, last, pause=0.05)) == [400, 200]
    assert numbers.engine.sampled == before


def test_pipelined_requests_are_answered_one_after_the_other(numbers: Any) -> None:
    answer = talk(numbers, SMUGGLED + SMUGGLED.replace(b"/v1/chat", b"/v1/chut"), answers=2)
    assert statuses(answer) == [200, 404]


@pytest.mark.parametrize(
    "target", [b"http://evil.example/v1/chat/completions", b"//evil.example/v1/chat/completions"]
)
@pytest.mark.parametrize("host", [b"evil.example", b"127.0.0.1:1", b"a" * 300])
def test_the_host_header_has_no_effect(numbers: Any, target: bytes, host: bytes) -> None:
    request = SMUGGLED.replace(b"/v1/chat/completions", target, 1).replace(
        b"Host: x", b"Host: " + host
    )
    answer = talk(numbers, request, answers=1)
    assert statuses(answer)[0] in {200, 400, 404}
    assert b"evil.example/" not in answer.partition(b"\r\n\r\n")[0]


# --- too much ---

LARGE = {
    "one header": b"X-A: " + b"a" * MAX_HEAD_BYTES + b"\r\n",
    "many headers": b"".join(b"X-%d: aaaaaaa\r\n" % i for i in range(7_000)),
}


@pytest.mark.parametrize("headers", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("ended", [True, False])
def test_a_large_head_is_431(numbers: Any, headers: bytes, ended: bool) -> None:
    answer = talk(numbers, HEAD + headers + (b"Content-Length: 2\r\n\r\n{}" if ended else b""))
    assert statuses(answer) == [431]
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "head_too_large"


def test_a_long_target_is_431(numbers: Any) -> None:
    assert statuses(talk(numbers, b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")) == [
        431
    ]


def test_a_flood_of_headers_is_closed_early(numbers: Any) -> None:
    """A head of 100 MB is not read to its end, and the server continues to serve."""
    sent = 0
    with (
        socket.create_connection(("127.0.0.1", numbers.port), timeout=60) as raw,
        contextlib.suppress(OSError),
    ):
        raw.sendall(HEAD)
        for i in range(1_000):
            raw.sendall(b"X-%d: " % i + b"a" * 100_000 + b"\r\n")
            sent += 100_000
    assert sent < 50_000_000, "more than the buffers of the sockets can hold"
    assert numbers.get("/health").status_code == 200


def test_a_head_of_the_usual_size_is_served(numbers: Any) -> None:
    headers = b"".join(b"X-%d: %s\r\n" % (i, b"a" * 1000) for i in range(40))
    assert statuses(
        talk(
            numbers, HEAD + headers + b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY), answers=1
        )
    ) == [200]


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat", HEAD])
def test_an_incomplete_head_is_closed(
    serve: Any, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    live = serve('# head seconds\n[engine]\nkind = "fake"\n')
    monkeypatch.setattr(BoundedProtocol, "head_seconds", 0.3)
    with socket.create_connection(("127.0.0.1", live.port), timeout=60) as raw:
        raw.sendall(sent)
        assert raw.recv(100) == b""


@pytest.mark.slow
def test_a_slow_second_head_is_closed(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    live = serve('# head seconds\n[engine]\nkind = "fake"\n')
    monkeypatch.setattr(BoundedProtocol, "head_seconds", 3.0)
    with socket.create_connection(("127.0.0.1", live.port), timeout=60) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert raw.recv(1000).startswith(b"HTTP/1.1 200")
        raw.sendall(b"GET /health HTTP/1.1\r\nHo")
        assert raw.recv(100) == b""


def test_a_head_in_pieces_is_read(numbers: Any) -> None:
    pieces = [SMUGGLED[i : i + 20] for i in range(0, len(SMUGGLED), 20)]
    assert statuses(talk(numbers, *pieces, pause=0.002, answers=1)) == [200]
    assert numbers.idle()


async def _answer_slowly(scope: Any, receive: Any, send: Any) -> None:
    """Send the head, then the body once the client has sent its own."""
    del scope
    head = [(b"content-length", b"4")]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.body", "body": b"body"})


@pytest.mark.anyio
async def test_a_head_is_sent_before_its_body_exists() -> None:
    options: dict[str, Any] = {"log_config": None, "lifespan": "off", "port": 0}
    server = uvicorn.Server(uvicorn.Config(_answer_slowly, http=BoundedProtocol, **options))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(HEAD + b"Content-Length: 1\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.write(b"x")
        assert await reader.readexactly(4) == b"body"
        writer.close()
        server.should_exit = True
        await serving


async def _answer(scope: Any, receive: Any, send: Any) -> None:
    del scope, receive
    head = [(b"content-length", b"4")]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": b"body"})


@pytest.mark.anyio
@pytest.mark.parametrize("is_sent", [True, False])
async def test_the_end_of_the_server_waits_for_the_first_request_of_a_connection(
    monkeypatch: pytest.MonkeyPatch, is_sent: bool
) -> None:
    monkeypatch.setattr(BoundedProtocol, "arrival_seconds", 3600.0 if is_sent else 0.01)
    options: dict[str, Any] = {"log_config": None, "lifespan": "off", "port": 0}
    server = uvicorn.Server(uvicorn.Config(_answer, http=BoundedProtocol, **options))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        reader, writer = await asyncio.open_connection(*address)
        while not server.server_state.connections:
            await asyncio.sleep(0)
        server.should_exit = True
        # The listener is closed in the same step in which its connections are ended.
        while listener.fileno() != -1:
            await asyncio.sleep(0.001)
        if is_sent:
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = await reader.read()
        await serving
    assert answer.startswith(b"HTTP/1.1 200") == is_sent
    assert answer.endswith(b"body") == is_sent
    writer.close()
