"""Requests that the engine answers itself: those without `align`, its other routes, and an upstream's Responses API.

They hold a place and are charged as any other request is; what they may sample is read from the limit that they name.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, runtime_checkable

from starlette.responses import Response as HttpResponse
from starlette.types import Message, Receive, Scope, Send

from infer_align.engines import App
from infer_align.errors import AlignError, InvalidRequest, Unsupported
from infer_align_server.limits.token_budget import charged
from infer_align_server.service import Service
from infer_align_server.wire.disconnect import until_client_leaves
from infer_align_server.wire.encoding import dumps

# Routes of engines that generate, whether or not a request names its limit; what else generates is charged by its usage.
GENERATING = re.compile(r"/v1/(responses|messages)/?")
LIMITS = ("max_output_tokens", "max_completion_tokens", "max_tokens")
_USAGE = re.compile(rb'"(?:completion_tokens|output_tokens)"\s*:\s*(\d{1,12})')
TAIL_BYTES = 2**16


@runtime_checkable
class Relays(Protocol):
    """An engine whose upstream serves routes of its own, here the Responses API."""

    def relay(
        self, method: str, path: str, content: bytes | None, model: str | None
    ) -> AbstractAsyncContextManager[tuple[str, AsyncIterator[bytes]]]:
        """The content type and the bytes of the upstream's answer, as they come."""


def sampled_at_most(service: Service, path: str, body: Mapping[str, Any]) -> int:
    """The worst case of a request to a route of the engine's own; 0 where it names no limit and is not known to generate.

    Raises:
        InvalidRequest: over this server's limit.
        Unsupported: it asks for `align`.
    """
    if body.get("align") is not None:
        raise Unsupported(
            "align: is for /v1/chat/completions and /v1/completions; leave it out here.",
            param="align",
        )
    named = [(name, body[name]) for name in LIMITS if _is_count(body.get(name))]
    if not named and not GENERATING.fullmatch(path):
        return 0
    name, tokens = (
        named[0]
        if named
        else (LIMITS[0], service.engine.worst_case_tokens({**body, "messages": []}))
    )
    if tokens > (most := service.config.limits.max_completion_tokens):
        raise InvalidRequest(
            f"{name}: the worst case is {tokens} tokens, over this server's limit of {most}; ask for fewer.",
            param=name,
            code="over_limit",
        )
    return int(tokens)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def fields_of(content: bytes) -> Mapping[str, Any]:
    """Those of a JSON object, as the engine will read it; none where it is something else, which is the engine's to judge."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


class Forwarded(HttpResponse):
    """The engine's answer to a request whose body was read here, byte for byte; it holds a place as any other request does.

    Args:
        json: the body was read as JSON, and is sent on as such: clients that forget to say so are understood here too.
        tokens: its worst case; None where it asks for nothing new, and so is not charged for the usage that it is told.
    """

    def __init__(
        self,
        service: Service,
        app: App,
        body: bytes,
        caller: str,
        tokens: int | None = None,
        *,
        json: bool = False,
    ) -> None:
        super().__init__()
        self._counted = tokens is not None
        self._json = json
        self._service = service
        self._app = app
        self._unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        self._caller = caller
        self._tokens = tokens or 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the engine answer.

        Raises:
            Overloaded: the queue is full.
        """

        async def replay() -> Message:
            return self._unread.pop() if self._unread else await receive()

        headers = scope["headers"]
        if self._json:
            headers = [(name, value) for name, value in headers if name != b"content-type"] + [
                (b"content-type", b"application/json")
            ]
        with charged(self._service.tokens, self._caller, self._tokens) as charge:
            answer = _Answer(send)
            async with self._service.admission.admit(self._tokens, caller=self._caller):
                charge.metered(None)
                await self._app(
                    {**scope, "headers": headers},
                    replay,
                    answer.send if self._service.tokens.limited else send,
                )
            charge.spent = answer.tokens(self._tokens) if self._counted else 0


class Relayed(HttpResponse):
    """An upstream's answer, byte for byte; its connection is closed when the client leaves.

    Args:
        asked: method, path, content and model, see `Relays.relay`.
        tokens: as of `Forwarded`.
    """

    def __init__(
        self,
        service: Service,
        engine: Relays,
        asked: tuple[str, str, bytes | None, str | None],
        caller: str,
        tokens: int | None = None,
    ) -> None:
        super().__init__()
        self._counted = tokens is not None
        self._service = service
        self._engine = engine
        self._asked = asked
        self._caller = caller
        self._tokens = tokens or 0

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        """Let the upstream answer.

        Raises:
            AlignError: the queue is full, or the upstream refuses or fails.
        """
        await until_client_leaves(receive, self._relay(send))

    async def _relay(self, send: Send) -> None:
        with charged(self._service.tokens, self._caller, self._tokens) as charge:
            answer = _Answer(send)
            async with self._service.admission.admit(self._tokens, caller=self._caller):
                charge.metered(None)
                try:
                    async with self._engine.relay(*self._asked) as (content_type, pieces):
                        await self._pass(answer.send, content_type, pieces)
                finally:
                    if answer.begun:
                        charge.spent = answer.tokens(self._tokens) if self._counted else 0

    async def _pass(self, send: Send, content_type: str, pieces: AsyncIterator[bytes]) -> None:
        start: Message = {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", content_type.encode("latin-1"))],
        }
        if not content_type.startswith("text/event-stream"):
            content = b"".join(
                [piece async for piece in pieces]
            )  # an answer that breaks off still has its own status
            await send(start)
            await send({"type": "http.response.body", "body": content})
            return
        await send(start)
        try:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except AlignError as error:
            event = {
                "type": "error",
                "code": error.code,
                "message": error.message,
                "param": error.param,
            }
            await send(
                {
                    "type": "http.response.body",
                    "body": b"event: error\ndata: " + dumps(event) + b"\n\n",
                    "more_body": True,
                }
            )
        await send({"type": "http.response.body", "body": b""})


class _Answer:
    """Reads along what the engine answers, to know what it sampled."""

    def __init__(self, send: Send) -> None:
        self.begun = False
        self._send = send
        self._body = bytearray()  # all of it; of a stream its end
        self._events = 0
        self._streamed = False
        self._refused = False

    async def send(self, message: Message) -> None:
        """Pass it on."""
        self.begun = True
        if message["type"] == "http.response.start":
            self._refused = message["status"] >= 400
            headers = {name.lower(): value for name, value in message.get("headers", ())}
            self._streamed = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        piece = message.get("body", b"")
        self._body += piece
        if self._streamed:
            self._events += piece.count(b"data: ")
            del self._body[:-TAIL_BYTES]
        await self._send(message)

    def tokens(self, worst_case: int) -> int:
        """As its usage says, or the events of a stream, none where it refused; the worst case where it says neither."""
        if self._refused:
            return 0
        if self._streamed:
            said = _USAGE.findall(self._body)
            return int(said[-1]) if said else self._events
        try:
            usage = json.loads(self._body)["usage"]
            spent = (
                usage["completion_tokens"]
                if "completion_tokens" in usage
                else usage["output_tokens"]
            )
            return max(0, int(spent))
        except (ValueError, LookupError, TypeError, RecursionError, OverflowError):
            return worst_case
