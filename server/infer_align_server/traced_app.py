"""Middleware that traces each request; it is absent unless `[telemetry]` has an endpoint."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infer_align_server.collector import Tracing
from infer_align_server.logs import access_fields, describe
from infer_align_server.telemetry import traced_request
from infer_align_server.wire.disconnect import ClientLeft

# Probes come every few seconds and say nothing.
UNTRACED = frozenset({"/health", "/ready", "/metrics"})


class TracedApp:
    """An application whose requests are spans.

    Args:
        app: The application.
        tracing: The connection to the collector.
    """

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or scope["path"] in UNTRACED:
            await self._app(scope, receive, send)
            return
        status = 0
        error_type = ""

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if _is_stream(message):
                    trace.streams()
            await send(message)

        with traced_request(self._tracing, Headers(scope=scope), scope["method"]) as trace:
            describe(trace_id=trace.trace_id)
            try:
                await self._app(scope, receive, send_and_note)
            except BaseException as error:
                has_left = isinstance(error, ClientLeft | ClientDisconnect)
                error_type = "disconnected" if has_left else type(error).__name__
                raise
            finally:
                route = getattr(scope.get("route"), "path", "")
                trace.finish(route, status, access_fields.get() or {}, error_type)


def _is_stream(start: Message) -> bool:
    """Return True if the start of an answer announces server-sent events."""
    for name, value in start.get("headers", ()):
        if name == b"content-type":
            return bool(value.startswith(b"text/event-stream"))
    return False
