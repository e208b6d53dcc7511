"""uvicorn's HTTP protocol with limits on the size and the duration of a request's head.

uvicorn itself has neither limit. A client without them could fill the memory with headers, or
hold connections open by never finishing a head.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from infer_align.errors import AlignError, InvalidRequest
from infer_align_server.wire.encoding import dumps
from infer_align_server.wire.errors import error_json

MAX_HEAD_BYTES = 64 * 1024
REASONS = {400: b"Bad Request", 431: b"Request Header Fields Too Large"}


class _HeadTooLargeError(Exception):
    """Raised inside the parser to end the request."""


class BoundedProtocol(HttpToolsProtocol):  # type: ignore[misc]
    """An HTTP protocol that refuses large and slow heads.

    A head that is too large gets status 431. The connection of a head that takes too long is
    closed. Bytes that are not HTTP get status 400. Errors have OpenAI's format.
    """

    head_seconds = 30.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Start the clock for the first head of a new connection."""
        super().connection_made(transport)
        self._in_head = False
        self._head_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock of a closed connection."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes; count them if they leave a head incomplete."""
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self.send_400_response("")
        elif self._timer is None:
            self._start_timer()

    def on_message_begin(self) -> None:
        """Start to count the bytes of a head."""
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        """Check the size of a complete head.

        Raises:
            _HeadTooLargeError: The head is over the limit.
        """
        self._in_head = False
        self._stop_timer()
        self._head_bytes = len(self.url)
        for name, value in self.headers:
            self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise _HeadTooLargeError
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Send an error and close the connection; `msg` is uvicorn's description."""
        error: AlignError
        if self._head_bytes > MAX_HEAD_BYTES:
            error = InvalidRequest(
                f"The request's head is over the limit of {MAX_HEAD_BYTES} bytes; send fewer or "
                "shorter headers.",
                code="head_too_large",
                status=431,
            )
        else:
            error = InvalidRequest(f"This is not an HTTP request: {msg}", code="invalid_http")
        body = dumps(error_json(error))
        head = (
            b"HTTP/1.1 %d %s\r\n"
            b"content-type: application/json\r\n"
            b"content-length: %d\r\n"
            b"connection: close\r\n\r\n"
        )
        self.transport.write(head % (error.status, REASONS[error.status], len(body)) + body)
        self.transport.close()

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.head_seconds, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
