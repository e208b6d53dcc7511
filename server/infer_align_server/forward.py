"""Requests that the engine's own application answers: those without `align`, and its other routes."""

from __future__ import annotations

from json import loads

from starlette.responses import Response as HttpResponse
from starlette.types import Message, Receive, Scope, Send

from infer_align.engines import App
from infer_align_server.rates import charged
from infer_align_server.service import Service


class Forwarded(HttpResponse):
    """The engine's answer to a request whose body was read here, byte for byte; it holds a place as any other request does.

    Args:
        json: the body was read as JSON, and is sent on as such: clients that forget to say so are understood here too.
    """

    def __init__(self, service: Service, app: App, body: bytes, caller: str, tokens: int = 0, *, json: bool = False) -> None:
        super().__init__()
        self._json = json
        self._service = service
        self._app = app
        self._unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        self._caller = caller
        self._tokens = tokens

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
                await self._app({**scope, "headers": headers}, replay, answer.send if self._service.tokens.limited else send)
            charge.spent = min(charge.spent, answer.tokens(self._tokens))


class _Answer:
    """Reads along what the engine answers, to know what it sampled."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._body = bytearray()
        self._events = 0
        self._refused = False

    async def send(self, message: Message) -> None:
        """Pass it on."""
        self._refused = self._refused or message.get("status", 0) >= 400
        if self._events or b"data: " in message.get("body", b"")[:6]:
            self._events += message["body"].count(b"data: ")
        else:
            self._body += message.get("body", b"")
        await self._send(message)

    def tokens(self, worst_case: int) -> int:
        """As its usage says, or the pieces of a stream, none where it refused; the worst case where it says neither."""
        if self._refused:
            return 0
        if self._events:
            return self._events
        try:
            return int(loads(self._body)["usage"]["completion_tokens"])
        except (ValueError, LookupError, TypeError):
            return worst_case
