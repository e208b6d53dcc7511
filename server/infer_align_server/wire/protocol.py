"""HTTP as uvicorn reads it, with a limit on the size of a request's head and on how long it may take: uvicorn has neither."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from infer_align.errors import AlignError, InvalidRequest
from infer_align_server.wire.encoding import dumps
from infer_align_server.wire.errors import error_json

MAX_HEAD_BYTES = 64 * 1024
REASONS = {400: b"Bad Request", 431: b"Request Header Fields Too Large"}


class _HeadTooLarge(Exception):
    """Raised inside the parser, which ends the request with it."""


class BoundedProtocol(HttpToolsProtocol):  # type: ignore[misc]
    """Refuses a head that is too large with 431, hangs up on one that does not end; what is no HTTP is a 400 in OpenAI's shape."""

    head_seconds = 30.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A client has connected: it has `head_seconds` to say what it wants."""
        super().connection_made(transport)
        self._in_head = False
        self._head_bytes = 0
        self._too_slow: asyncio.TimerHandle | None = self.loop.call_later(
            self.head_seconds, transport.close
        )

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._in_time()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes; a head that is still open after them counts against the limits."""
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response("")
            elif self._too_slow is None:
                self._too_slow = self.loop.call_later(self.head_seconds, self.transport.close)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        """Its head is read.

        Raises:
            _HeadTooLarge: it came at once and is over the limit.
        """
        self._in_head = False
        self._in_time()
        self._head_bytes = len(self.url) + sum(
            len(name) + len(value) for name, value in self.headers
        )
        if self._head_bytes > MAX_HEAD_BYTES:
            raise _HeadTooLarge
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse, and hang up; `msg` is uvicorn's."""
        error: AlignError = InvalidRequest(f"not a request: {msg}", code="invalid_http")
        if self._head_bytes > MAX_HEAD_BYTES:
            error = InvalidRequest(
                f"the request's head is over {MAX_HEAD_BYTES} bytes.",
                code="head_too_large",
                status=431,
            )
        body = dumps(error_json(error))
        head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (error.status, REASONS[error.status], len(body)) + body)
        self.transport.close()

    def _in_time(self) -> None:
        if self._too_slow is not None:
            self._too_slow.cancel()
            self._too_slow = None
