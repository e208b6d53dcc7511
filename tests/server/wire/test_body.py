"""Bodies are bounded JSON objects; whatever JSON cannot represent is refused by its place."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from starlette.requests import Request

from infer_align.errors import BodyTooLarge, InvalidRequest
from infer_align_server.wire.body import MAX_NESTING, parse_body, read_body, read_bytes

pytestmark = pytest.mark.anyio


def request_of(*chunks: bytes, content_length: str | None = None) -> Request:
    """Return a request whose body arrives in chunks."""
    messages: list[Any] = []
    for i, chunk in enumerate(chunks):
        more = i < len(chunks) - 1
        messages.append({"type": "http.request", "body": chunk, "more_body": more})
    arriving = iter(messages)

    async def receive() -> Any:
        return next(arriving)

    headers = [(b"content-length", content_length.encode())] if content_length else []
    return Request({"type": "http", "method": "POST", "headers": headers}, receive)


async def test_a_body_in_chunks_is_one_object() -> None:
    assert await read_body(request_of(b'{"a"', b": [1, ", b"2]}"), 100) == {"a": [1, 2]}


@pytest.mark.parametrize("chunks", [(b"12345",), (b"123", b"45"), (b"12", b"", b"345")])
async def test_a_body_may_be_as_long_as_the_limit(chunks: tuple[bytes, ...]) -> None:
    assert await read_bytes(request_of(*chunks), 5) == b"12345"
    with pytest.raises(BodyTooLarge, match="4 bytes"):
        await read_bytes(request_of(*chunks), 4)


async def test_a_body_that_announces_too_much_is_not_read() -> None:
    # There is no chunk: reading would fail.
    with pytest.raises(BodyTooLarge):
        await read_bytes(request_of(content_length="101"), 100)


@pytest.mark.parametrize("content_length", ["", "-1", "many", "1e9"])
async def test_a_length_that_is_no_number_is_ignored(content_length: str) -> None:
    assert await read_bytes(request_of(b"{}", content_length=content_length), 100) == b"{}"


@pytest.mark.parametrize(
    ("received", "fix"),
    [
        (
            gzip.compress(b'{"a": 1}', mtime=0),
            "its byte 1 is not UTF-8; send it in UTF-8, and without comp",
        ),
        ('{"a": 1}'.encode("utf-16"), "its byte 0 is not UTF-8; send it in UTF-8"),
        (b'{"a": ' + b"[" * 100_000, "nested deeper than 128 levels; send fewer"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "nested deeper than 128 levels; send fewer"),
        (b'{"a": ' + b"1" * 5000 + b"}", "integer of over 4300 digits; write fewer"),
    ],
    ids=["gzip", "UTF-16", "deep", "deep and closed", "digits"],
)
async def test_a_refusal_says_what_to_send(received: bytes, fix: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_body(received)
    assert fix in refused.value.message
    assert refused.value.code == "invalid_json"


@pytest.mark.parametrize(
    "received",
    [b"", b"{", b"\xff{}", b'{"a": NaN}', b'{"a": Infinity}', b"[1]", b'"text"', b"5", b"null"],
)
async def test_what_is_no_json_object_is_refused(received: bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_body(received)
    assert refused.value.code == "invalid_json"


async def test_nesting_is_limited() -> None:
    def nested(levels: int) -> bytes:
        return b'{"a": ' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"

    assert parse_body(nested(MAX_NESTING - 1))
    for levels in (MAX_NESTING + 1, 100_000):
        with pytest.raises(InvalidRequest, match="JSON"):
            parse_body(nested(levels))


@pytest.mark.parametrize(
    ("received", "param"),
    [
        ('{"temperature": 1e999}', "temperature"),
        ('{"a": {"b": [0, -1e400]}}', "a.b[1]"),
        ('{"a": [[{"c": 1e309}]]}', "a[0][0].c"),
    ],
)
async def test_a_number_too_large_is_named(received: str, param: str) -> None:
    with pytest.raises(InvalidRequest, match="too large") as refused:
        parse_body(received.encode())
    assert refused.value.param == param


async def test_surrogates_come_in_pairs() -> None:
    assert parse_body(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}
    for text in (b"\\ud83d", b"\\ude00", b"\\ude00\\ud83d"):
        with pytest.raises(InvalidRequest, match="surrogates"):
            parse_body(b'{"a": "' + text + b'"}')
        with pytest.raises(InvalidRequest, match="surrogates"):
            parse_body(b'{"' + text + b'": 1}')


async def test_numbers_and_text_stay_as_they_are() -> None:
    body = {"n": 2**70, "x": -0.1, "text": "ü 猫 \x00 \U0001f600", "none": None, "yes": True}
    assert parse_body(json.dumps(body).encode()) == body
    assert parse_body(json.dumps(body, ensure_ascii=False).encode()) == body
