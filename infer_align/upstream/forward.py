"""Requests that are passed on to an upstream as they are, and its answers.

A body goes through as bytes. Of a request's headers, only REQUEST_HEADERS pass, so a client's own
key, organization or address never reaches an upstream. Of an answer's headers, all pass except
DROPPED_RESPONSE_HEADERS and those of CORS, which are about this server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

# Headers of a client's request that describe its body or the API that it speaks.
REQUEST_HEADERS = frozenset(
    {
        "content-type",
        "accept",
        "content-length",
        "idempotency-key",
        "openai-beta",
        "anthropic-version",
        "anthropic-beta",
        "traceparent",
        "tracestate",
    }
)
# Headers of an answer that are about the connection, or that this server writes itself.
DROPPED_RESPONSE_HEADERS = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "content-length",
        "content-encoding",
        "date",
        "server",
        "set-cookie",
        "alt-svc",
        "strict-transport-security",
        "www-authenticate",
        "vary",
    }
)


@dataclass(frozen=True, slots=True)
class ForwardedRequest:
    """A request to pass on.

    Attributes:
        method: the HTTP method.
        path: path and query below the base URL.
        content: the body: bytes, or pieces as they arrive, which can be sent only once.
        headers: the headers to send; see `request_headers`.
        model: only upstreams that serve it get the request; None for any upstream.
        try_every_host: True if only one of the upstreams has the object that the request is about:
            after a 404 or 405 the next one is tried.
        below_root: True if the path stands beside the "/v1" of the base URL, not below it.
    """

    method: str
    path: str
    content: bytes | AsyncIterator[bytes] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    try_every_host: bool = False
    below_root: bool = False

    def url(self, base: str) -> str:
        """Return the URL at an upstream with this base URL."""
        root = base.removesuffix("/v1") if self.below_root else base
        return root + self.path

    @property
    def repeatable(self) -> bool:
        """Return True if the request can be sent again."""
        return self.content is None or isinstance(self.content, bytes)


@dataclass(frozen=True, slots=True)
class ForwardedAnswer:
    """An upstream's answer.

    Attributes:
        status: its HTTP status.
        headers: the headers that pass; see `response_headers`.
        content_length: the length of the body in bytes, if it is known.
        chunks: the body as it arrives.
        read: returns the whole body, in place of `chunks`.
    """

    status: int
    headers: list[tuple[bytes, bytes]]
    content_length: int | None
    chunks: AsyncIterator[bytes]
    read: Callable[[], Awaitable[bytes]]

    @property
    def content_type(self) -> str:
        """Return the content type without its parameters."""
        for name, value in self.headers:
            if name == b"content-type":
                return value.decode("latin-1").partition(";")[0].strip().lower()
        return ""


def request_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers of a client that pass to an upstream."""
    passed: dict[str, str] = {}
    # One pass: each look-up would read the whole list.
    for name, value in headers.items():
        if name in REQUEST_HEADERS:
            passed.setdefault(name, value)
    return passed


def response_headers(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    """Return the headers of an upstream that pass to a client, with names in lower case."""
    passed = []
    for name, value in headers:
        lower = name.lower()
        if lower not in DROPPED_RESPONSE_HEADERS and not lower.startswith("access-control-"):
            passed.append((lower.encode("latin-1"), value.encode("latin-1", "replace")))
    return passed
