"""URLs of servers: those that can be called, and those that never can."""

from __future__ import annotations

import pytest

from infer_align.urls import is_http_url, quote_url


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8000/v1",
        "https://example.com",
        "http://[::1]:8000/v1",
        "http://b\u00fccher.example/v1",
        "http://user:password@host/v1",
        "http://host_with_underscore:1/",
    ],
)
def test_urls_that_can_be_called(url: str) -> None:
    assert is_http_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://",
        "ftp://host",
        "//host",
        "http://a b",
        "http://a\nb",
        "http://a\0b",
        "http://[::1",
        "http://host:99999",
        "http://host:0",
        "http://host:x",
        "http://a..b",
        "http://" + "a" * 64,
    ],
)
def test_urls_that_never_can(url: str) -> None:
    assert not is_http_url(url)


def test_a_password_is_not_quoted() -> None:
    assert "secret" not in quote_url("http://user:secret@a b")
    assert quote_url("http://a b") == "'http://a b'"
