"""Requests that the engine answers itself, without our flow.

These are requests without `align`, other routes of the engine, and the Responses API of an
upstream. They go through admission and the token budget like every other request. Their worst
case is the token limit that the request itself names.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from starlette.responses import Response as HttpResponse
from starlette.types import Message, Receive, Scope, Send

from infer_align.engines import App
from infer_align.errors import AlignError, InvalidRequest, Unsupported
from infer_align_server.limits.token_budget import Charge, charged
from infer_align_server.service import Service
from infer_align_server.wire.disconnect import until_client_leaves
from infer_align_server.wire.encoding import dumps

# These routes always generate. A request to another route generates only if it names a limit.
# Without a limit, such a request is charged by the usage in its response.
GENERATING = re.compile(r"/v1/(responses|messages)/?")
LIMIT_FIELDS = ("max_output_tokens", "max_completion_tokens", "max_tokens")
_USAGE = re.compile(rb'"(?:completion_tokens|output_tokens)"\s*:\s*(\d{1,12})')
TAIL_BYTES = 2**16


@runtime_checkable
class ServesApplication(Protocol):
    """An engine with an ASGI application of its own, such as vLLM's."""

    def app(self) -> App | None:
        """Return the application, or None until the engine has started."""


@runtime_checkable
class RelaysResponses(Protocol):
    """An engine whose upstream may serve the Responses API."""

    def relay(
        self, method: str, path: str, content: bytes | None, model: str | None
    ) -> AbstractAsyncContextManager[tuple[str, AsyncIterator[bytes]]]:
        """Open a request below the upstream's base URL.

        Args:
            method: The HTTP method.
            path: The path below the base URL, with the query.
            content: The body, if there is one.
            model: The model that the request is for; None for any host.

        Returns:
            The content type of the response, and its bytes as they arrive.
        """


@dataclass(frozen=True, slots=True)
class RelayRequest:
    """The arguments of one call of `RelaysResponses.relay`."""

    method: str
    path: str
    content: bytes | None = None
    model: str | None = None


def engine_app(service: Service) -> App | None:
    """Return the engine's own application if it has one and has started."""
    engine = service.engine
    return engine.app() if isinstance(engine, ServesApplication) else None


def serves_responses(service: Service) -> bool:
    """Return True if the engine may serve the Responses API."""
    return engine_app(service) is not None or isinstance(service.engine, RelaysResponses)


def route_worst_case(service: Service, path: str, body: Mapping[str, Any]) -> int:
    """Return the largest number of tokens that a request to a route of the engine can generate.

    It is 0 if the request names no limit and the route is not known to generate.

    Raises:
        InvalidRequest: The limit in the request is over the limit of this server.
        Unsupported: The request contains `align`.
    """
    if body.get("align") is not None:
        raise Unsupported(
            "align: only allowed on /v1/chat/completions and /v1/completions; leave it out here.",
            param="align",
        )
    names = [name for name in LIMIT_FIELDS if _is_positive_integer(body.get(name))]
    if names:
        name = names[0]
        tokens = int(body[name])
    elif GENERATING.fullmatch(path):
        name = LIMIT_FIELDS[0]
        tokens = service.engine.worst_case_tokens({**body, "messages": []})
    else:
        return 0
    limit = service.config.limits.max_completion_tokens
    if tokens > limit:
        raise InvalidRequest(
            f"{name}: the worst case is {tokens} tokens, over this server's limit of {limit}; "
            f"set {name} to {limit} or less.",
            param=name,
            code="over_limit",
        )
    return tokens


def _is_positive_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def json_fields(content: bytes) -> Mapping[str, Any]:
    """Return the fields of a JSON object; an empty mapping for any other content."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


class ForwardedResponse(HttpResponse):
    """The response of the engine's application, passed on byte for byte.

    Args:
        service: The service whose admission and token budget the request uses.
        app: The engine's application.
        body: The request's body.
        caller: The caller that pays for the tokens.
        worst_case: The largest number of tokens it can generate. None if it generates nothing;
            then the usage in the response is not charged.
        json: Forward the body with the content type of JSON, also if the client sent another.
    """

    def __init__(
        self,
        service: Service,
        app: App,
        body: bytes,
        caller: str,
        worst_case: int | None = None,
        *,
        json: bool = False,
    ) -> None:
        super().__init__()
        self._service = service
        self._app = app
        self._unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        self._caller = caller
        self._generates = worst_case is not None
        self._worst_case = worst_case or 0
        self._json = json

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the engine respond.

        Raises:
            Overloaded: The queue is full, or the caller's token budget is used up.
        """

        async def replay() -> Message:
            return self._unread.pop() if self._unread else await receive()

        headers = scope["headers"]
        if self._json:
            headers = [(name, value) for name, value in headers if name != b"content-type"]
            headers.append((b"content-type", b"application/json"))
        forwarded = {**scope, "headers": headers}
        budget = self._service.tokens
        with charged(budget, self._caller, self._worst_case) as charge:
            meter = _TokenMeter(send)
            async with self._service.admission.admit(self._worst_case, caller=self._caller):
                charge.start(None)
                await self._app(forwarded, replay, meter.send if budget.limited else send)
            charge.spent = meter.tokens(self._worst_case) if self._generates else 0


class RelayedResponse(HttpResponse):
    """An upstream's response, passed on byte for byte.

    When the client leaves, the connection to the upstream is closed.

    Args:
        service: The service whose admission and token budget the request uses.
        engine: The engine that relays.
        request: The request to relay.
        caller: The caller that pays for the tokens.
        worst_case: See `ForwardedResponse`.
    """

    def __init__(
        self,
        service: Service,
        engine: RelaysResponses,
        request: RelayRequest,
        caller: str,
        worst_case: int | None = None,
    ) -> None:
        super().__init__()
        self._service = service
        self._engine = engine
        self._request = request
        self._caller = caller
        self._generates = worst_case is not None
        self._worst_case = worst_case or 0

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        """Let the upstream respond.

        Raises:
            AlignError: The queue is full, or the upstream refuses the request or fails.
        """
        await until_client_leaves(receive, self._relay(send))

    async def _relay(self, send: Send) -> None:
        with charged(self._service.tokens, self._caller, self._worst_case) as charge:
            async with self._service.admission.admit(self._worst_case, caller=self._caller):
                charge.start(None)
                await self._send_metered(send, charge)

    async def _send_metered(self, send: Send, charge: Charge) -> None:
        """Send the upstream's response, and charge the tokens that it contains."""
        request = self._request
        upstream = self._engine.relay(request.method, request.path, request.content, request.model)
        meter = _TokenMeter(send)
        try:
            async with upstream as (content_type, chunks):
                await _send_response(meter.send, content_type, chunks)
        finally:
            if meter.started:
                charge.spent = meter.tokens(self._worst_case) if self._generates else 0


async def _send_response(send: Send, content_type: str, chunks: AsyncIterator[bytes]) -> None:
    headers = [(b"content-type", content_type.encode("latin-1"))]
    start: Message = {"type": "http.response.start", "status": 200, "headers": headers}
    if content_type.startswith("text/event-stream"):
        await send(start)
        await _send_events(send, chunks)
        return
    # Read to the end first: if the upstream fails midway, the error still has its own status.
    content = b"".join([chunk async for chunk in chunks])
    await send(start)
    await send({"type": "http.response.body", "body": content})


async def _send_events(send: Send, chunks: AsyncIterator[bytes]) -> None:
    """Pass on a stream; if the upstream fails midway, end it with an error event."""
    try:
        async for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    except AlignError as error:
        event = {
            "type": "error",
            "code": error.code,
            "message": error.message,
            "param": error.param,
        }
        body = b"event: error\ndata: " + dumps(event) + b"\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


class _TokenMeter:
    """Counts the generated tokens of a response while it is sent."""

    def __init__(self, send: Send) -> None:
        self.started = False
        self._send = send
        # The whole body, or the last bytes of a stream.
        self._body = bytearray()
        self._events = 0
        self._is_stream = False
        self._is_error = False

    async def send(self, message: Message) -> None:
        """Send a message of the response."""
        self.started = True
        if message["type"] == "http.response.start":
            self._is_error = message["status"] >= 400
            headers = {name.lower(): value for name, value in message.get("headers", ())}
            self._is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        chunk = message.get("body", b"")
        self._body += chunk
        if self._is_stream:
            self._events += chunk.count(b"data: ")
            del self._body[:-TAIL_BYTES]
        await self._send(message)

    def tokens(self, worst_case: int) -> int:
        """Return the number of tokens that the response reports as generated.

        An error counts 0. A stream without usage counts one token per event. Any other response
        without usage counts `worst_case`.
        """
        if self._is_error:
            return 0
        if self._is_stream:
            counts = _USAGE.findall(self._body)
            return int(counts[-1]) if counts else self._events
        try:
            usage = json.loads(self._body)["usage"]
            name = "completion_tokens" if "completion_tokens" in usage else "output_tokens"
            return max(0, int(usage[name]))
        except (ValueError, LookupError, TypeError, RecursionError, OverflowError):
            return worst_case
