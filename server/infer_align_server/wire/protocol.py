"""uvicorn's HTTP protocol with limits on the size and the duration of a request's head.

uvicorn itself has neither limit. A client without them could fill the memory with headers, or
hold connections open by never finishing a head.

A request may offer to go on with another protocol, as Java's HTTP client and `curl --http2` do. The
server does not accept the offer, and answers the request as if it made none. uvicorn's parser ends
such a request at its head: the body would be lost, or be read as the next request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from infer_align.errors import AlignError, InvalidRequest, quote
from infer_align_server.wire.disconnect import EXTENSION
from infer_align_server.wire.encoding import dumps
from infer_align_server.wire.errors import error_json

MAX_HEAD_BYTES = 64 * 1024
REASONS = {400: b"Bad Request", 431: b"Request Header Fields Too Large"}


class _RefusedHeadError(Exception):
    """Raised inside the parser to end the request."""


class _JoiningTransport:
    """A transport that writes the head of an answer together with the first part of its body.

    uvicorn writes them one after the other, and the event loop hands each to the system at once:
    two calls, and two packets for the client. A head without a body is written in the next round
    of the event loop.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""
        self._flushing: asyncio.Handle | None = None

    def __getattr__(self, name: str) -> Any:
        """Return what is not about writing from the transport itself."""
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write a part of an answer, or keep it if it is a head."""
        if self._head:
            data = self._take_head() + data
        elif data.startswith(b"HTTP/"):
            self._head = data
            self._flushing = self._loop.call_soon(self._flush)
            return
        self._transport.write(data)

    def close(self) -> None:
        """Write what is kept, and close the connection."""
        self._flush()
        self._transport.close()

    def _take_head(self) -> bytes:
        head, self._head = self._head, b""
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        return head

    def _flush(self) -> None:
        if self._head:
            self._transport.write(self._take_head())


class _Parser(httptools.HttpRequestParser):
    """A parser that goes on after the head of a request with `Upgrade`, if that is declined."""

    def __init__(self, protocol: BoundedProtocol) -> None:
        """Parse the requests of a connection."""
        super().__init__(protocol)
        self._protocol = protocol
        # As uvicorn has it: what follows the last request of a connection is no error.
        self.set_dangerous_leniencies(lenient_data_after_close=True)

    def feed_data(self, data: Any) -> None:
        """Parse received bytes."""
        protocol = self._protocol
        parser = self
        while True:
            try:
                return super(_Parser, parser).feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if not protocol.declines:
                    raise
                data = memoryview(data)[upgrade.args[0] :]
                head = protocol.head_without_offer()
                protocol.parser = parser = _Parser(protocol)
                super(_Parser, parser).feed_data(head)


class BoundedProtocol(HttpToolsProtocol):  # type: ignore[misc]
    """An HTTP protocol that refuses large and slow heads.

    A head that is too large gets status 431. The connection of a head that takes too long is
    closed. Bytes that are not HTTP get status 400, and so does a head that two programs could read
    in two ways. Errors have OpenAI's format.

    It is a `Connection` of its requests: they see at once that their client left, without a task
    that waits for it.
    """

    head_seconds = 30.0
    # The time that the end of the server waits for the first request of a new connection.
    arrival_seconds = 1.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Start the clock for the first head of a new connection."""
        super().connection_made(_JoiningTransport(transport, self.loop))
        self.parser = _Parser(self)
        # True from the end of a head with an offer that the server does not accept.
        self.declines = False
        self._in_head = False
        self._in_message = False
        # Heads that begin in the received bytes.
        self._begun = 0
        self._is_ending = False
        self._head_bytes = 0
        # The reason why a complete head is refused.
        self._refusal = ""
        self._timer: asyncio.TimerHandle | None = None
        self._is_lost = False
        self._watches: list[Callable[[], None]] = []
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock of a closed connection."""
        self._stop_timer()
        super().connection_lost(exc)
        self._is_lost = True
        for leave in tuple(self._watches):
            leave()

    def shutdown(self) -> None:
        """Close the connection as soon as it has no request, at the end of the server.

        The first request of a new connection may be on its way. It would be lost.
        """
        if self.cycle is None:
            self._is_ending = True
            self.loop.call_later(self.arrival_seconds, self._close_unused)
        else:
            super().shutdown()

    def _close_unused(self) -> None:
        if self.cycle is None:
            self.transport.close()

    def watch(self, leave: Callable[[], None]) -> Callable[[], object]:
        """Call a function when the client leaves; return one that ends the watch."""
        if self._is_lost:
            handle: asyncio.Handle = self.loop.call_soon(leave)
            return handle.cancel
        # uvicorn stops to read at a large body. The end of a connection is only seen by reading.
        self.flow.resume_reading()
        self._watches.append(leave)
        return partial(self._watches.remove, leave)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes; count them if they leave a head incomplete.

        Bytes that also belong to an earlier request are not counted here, only in
        `on_headers_complete`: where the head begins among them is not known.
        """
        self._begun = 0
        begins = 0 if self._in_message else 1
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        if self._begun == begins:
            self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self.send_400_response("")
        elif self._timer is None:
            self._start_timer()

    def head_without_offer(self) -> bytes:
        """Return the head that has ended, without `Upgrade`."""
        target = self.parser.get_method() + b" " + self.url
        lines = [target + b" HTTP/" + self.parser.get_http_version().encode()]
        for name, value in self.headers:
            if name != b"upgrade":
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        """Start to count the bytes of a head."""
        super().on_message_begin()
        self.declines = False
        self.scope["extensions"] = {EXTENSION: self}
        self._in_head = True
        self._in_message = True
        self._begun += 1
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        """Check a complete head.

        Raises:
            _RefusedHeadError: It is over the limit, or can be read in two ways.
        """
        self._in_head = False
        self._stop_timer()
        self._head_bytes = len(self.url)
        for name, value in self.headers:
            self._head_bytes += len(name) + len(value)
        self._refusal = self._ambiguity()
        if self._refusal or self._head_bytes > MAX_HEAD_BYTES:
            raise _RefusedHeadError
        if self.parser.should_upgrade() and self._may_decline():
            self.declines = True
            return
        super().on_headers_complete()
        if self._is_ending and self.cycle is not None:
            # The server ends after this request, so the answer closes the connection.
            self.cycle.keep_alive = False

    def _ambiguity(self) -> str:
        """Return why two programs could read the head in two ways; "" if they could not."""
        hosts = 0
        for name, value in self.headers:
            if name == b"host":
                hosts += 1
            elif name == b"transfer-encoding" and value.lower() != b"chunked":
                coding = quote(value.decode("latin-1"))
                return f'Transfer-Encoding {coding} is not allowed; send "chunked", or a length.'
        if hosts > 1:
            return "it has more than one Host header; send one."
        if not hosts and self.parser.get_http_version() == "1.1":
            return "it has no Host header; send one."
        return ""

    def on_message_complete(self) -> None:
        """End a request, unless its head is to be parsed once more."""
        if not self.declines:
            self._in_message = False
            super().on_message_complete()

    def _may_decline(self) -> bool:
        """Return True if an offer is in the header `Upgrade`, and uvicorn does not accept it."""
        return self.parser.get_method() != b"CONNECT" and not self._should_upgrade()

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
            reason = self._refusal or msg
            error = InvalidRequest(
                f"This is not a valid HTTP request: {reason}", code="invalid_http"
            )
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
