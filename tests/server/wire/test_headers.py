"""The headers of a request, read once."""

from __future__ import annotations

from starlette.requests import Request

from infer_align_server.wire.headers import headers_of


def test_the_first_of_a_repeated_header_counts_and_the_list_is_read_once() -> None:
    raw = [(b"accept", b"a"), (b"x-name", b"\xe9"), (b"accept", b"b")]
    http = Request({"type": "http", "headers": raw})
    headers = headers_of(http)
    assert headers == {"accept": "a", "x-name": "\xe9"}
    assert headers_of(http) is headers
