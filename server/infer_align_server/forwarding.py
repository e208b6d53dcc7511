"""Requests that the upstreams answer themselves: they are passed on whole, and so is the answer.

    a completion without `align`     its worst case is admitted and charged as any other
    another route of an upstream     the worst case is the limit that the request names

API keys, rate limits, admission, budgets of tokens and limits on sizes hold as everywhere. When the
client leaves, the connection to the upstream is closed.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.types import Message, Receive, Scope, Send

from infer_align.errors import (
    AlignError,
    BodyTooLarge,
    DeadlineExceeded,
    EngineFailed,
    Unsupported,
)
from infer_align.flow.plan import worst_case
from infer_align.upstream import UpstreamFailed
from infer_align.upstream.forward import ForwardedAnswer, ForwardedRequest, request_headers
from infer_align.upstream.response import parse_error
from infer_align.upstream.trace import HEADER, trace
from infer_align_server.engine_roles import Forwards
from infer_align_server.limits.client_timeout import client_timeout, shortly_before
from infer_align_server.limits.token_budget import Charge, charged
from infer_align_server.logs import describe
from infer_align_server.model_choice import ModelChoice
from infer_align_server.service import Service
from infer_align_server.token_meter import TokenMeter
from infer_align_server.wire.body import content_length
from infer_align_server.wire.disconnect import until_client_leaves
from infer_align_server.wire.encoding import dumps
from infer_align_server.wire.errors import error_json
from infer_align_server.wire.headers import headers_of

JSON = {"content-type": "application/json"}
EVENT_STREAM = "text/event-stream"
# The one route whose absence is explained: many clients try it first.
RESPONSES = "/responses"
# The status and the message of a server that does not have a route at all.
NO_ROUTE_STATUSES = {404, 405, 501}
NO_ROUTE_MESSAGE = re.compile(r"|not found|method not allowed", re.IGNORECASE)
# One part of a path: no dots alone, and nothing that has a meaning in a URL.
_PATH_PART = re.compile(r"(?!\.+$)[\w.:@~+=,-]{1,300}", re.ASCII)
# Limits on the tokens of a completion, and the numbers of its answers.
_LIMITS = ("max_completion_tokens", "max_tokens")
_COUNTS = ("n", "best_of")
_COUNTED = frozenset({*_LIMITS, *_COUNTS})


def completion_worst_case(service: Service, body: Mapping[str, Any]) -> int:
    """Return the most tokens that a completion without `align` can generate.

    Values that are not numbers are left to the upstream, which refuses them.

    Raises:
        InvalidRequest: The request is over a limit of this server.
    """
    counted = {key: value for key, value in body.items() if key not in _COUNTED}
    for name in _LIMITS:
        if _is_whole(body.get(name)):
            counted[name] = int(body[name])
    counts = [int(body[name]) for name in _COUNTS if _is_whole(body.get(name))]
    counted["n"] = max(counts, default=1)
    return worst_case(counted, service.engine, service.config.limits)


def _is_whole(value: object) -> bool:
    """Return True for a positive number without a fraction; clients may write it as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value > 0 and float(value).is_integer()


def completion_request(
    http: HttpRequest, path: str, content: bytes, body: Mapping[str, Any], model: ModelChoice
) -> ForwardedRequest:
    """Return the request for a completion: the client's bytes, unless a name must change."""
    if body.get("model") != model.engine_model or "align" in body:
        fields = {key: value for key, value in body.items() if key != "align"}
        content = dumps({**fields, "model": model.engine_model})
    headers = {**_passed_headers(http), **JSON}
    return ForwardedRequest("POST", path, content, headers, model.engine_model)


def route_request(
    http: HttpRequest, content: bytes | AsyncIterator[bytes], model: str | None
) -> ForwardedRequest | None:
    """Return the request for another route; None if its path is not one that can be passed on."""
    path = http.url.path
    below_root = not path.startswith("/v1/")
    parts = path.removeprefix("/v1").strip("/").split("/")
    has_escaped_slash = b"%2f" in http.scope.get("raw_path", b"").lower()
    if has_escaped_slash or not all(_PATH_PART.fullmatch(part) for part in parts):
        return None
    target = "/" + "/".join(parts)
    if http.url.query:
        target += f"?{http.url.query}"
    headers = _passed_headers(http)
    if not isinstance(content, bytes) and "content-length" in headers_of(http):
        headers["content-length"] = headers_of(http)["content-length"]
    return ForwardedRequest(
        http.method,
        target,
        content or None,
        headers,
        model,
        # What was stored may be on any of the upstreams.
        try_every_host=model is None and len(parts) > 1,
        below_root=below_root,
    )


def _passed_headers(http: HttpRequest) -> dict[str, str]:
    headers = request_headers(headers_of(http))
    headers.pop("content-length", None)
    calls = trace.get()
    if calls is not None:
        # The whole request is one call, so it keeps its id.
        headers[HEADER] = calls.request_id
    return headers


class Upload:
    """The body of a request, read piece by piece while it is passed on.

    Args:
        http: The request.
        max_bytes: The largest size of the body.

    Attributes:
        exceeded: True once the body was larger than that.

    Raises:
        BodyTooLarge: The request announces a larger body.
    """

    def __init__(self, http: HttpRequest, max_bytes: int) -> None:
        self.exceeded = content_length(headers_of(http)) > max_bytes
        self._http = http
        self._max_bytes = max_bytes
        self._ended = asyncio.Event()
        self.check()

    def check(self) -> None:
        """Raise BodyTooLarge if the body was too large."""
        if self.exceeded:
            raise BodyTooLarge(
                f"The body is over this server's limit of {self._max_bytes} bytes for uploads; "
                "send a smaller one, or raise [limits] max_upload_bytes."
            )

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives."""
        size = 0
        async for piece in self._http.stream():
            size += len(piece)
            if size > self._max_bytes:
                self.exceeded = True
                raise BodyTooLarge("the upload is too large")
            yield piece
        self._ended.set()

    async def receive(self) -> Message:
        """Return the next message after the body."""
        await self._ended.wait()
        return await self._http.receive()


@dataclass(frozen=True, slots=True)
class Cost:
    """The price of a request that is passed on.

    Attributes:
        caller: The caller that pays.
        worst_case: The largest number of tokens that it can generate.
        generates: False if nothing is generated, so that the usage in the answer is not charged.
    """

    caller: str
    worst_case: int = 0
    generates: bool = True


class UpstreamResponse(HttpResponse):
    """The answer of an upstream, passed on as it arrives.

    Args:
        service: The service whose admission and token budget the request uses.
        engine: The engine that forwards.
        request: The request.
        cost: Its price.
        upload: The body, if it is passed on piece by piece.
        timeout: The seconds that the client waits for the answer; None if it is unknown.
        renamed: The engine's name of the model and the name in the API, if they differ.
    """

    def __init__(
        self,
        service: Service,
        engine: Forwards,
        request: ForwardedRequest,
        cost: Cost,
        *,
        upload: Upload | None = None,
        timeout: float | None = None,
        renamed: tuple[str, str] | None = None,
    ) -> None:
        # Nothing of the base class is used: its constructor would make a head that is not sent.
        self._service = service
        self._engine = engine
        self._request = request
        self._cost = cost
        self._upload = upload
        self._timeout = timeout
        self._names = _Names(*renamed) if renamed else None

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        """Let the upstream answer.

        Raises:
            AlignError: The queue is full, or there is no answer that can be passed on.
        """
        if self._upload:
            receive = self._upload.receive
        try:
            await until_client_leaves(receive, self._forward(send))
        except UpstreamFailed as error:
            if self._upload:
                self._upload.check()
            raise EngineFailed(
                error.message, status=error.status, retry_after=error.retry_after
            ) from None

    async def _forward(self, send: Send) -> None:
        cost = self._cost
        start = monotonic()
        meter = TokenMeter(send)
        async with (
            charged(self._service.tokens, cost.caller, cost.worst_case) as charge,
            self._service.admission.admit(cost.worst_case, caller=cost.caller),
        ):
            charge.start(None)
            await self._answer_charged(meter, charge)
        self._service.metrics.count_forwarded(
            meter.prompt_tokens(), charge.spent, monotonic() - start
        )

    async def _answer_charged(self, meter: TokenMeter, charge: Charge) -> None:
        try:
            await self._answer(meter.send)
        finally:
            describe(**meter.usage())
            if meter.started:
                worst_case = self._cost.worst_case
                charge.spent = meter.tokens(worst_case) if self._cost.generates else 0

    async def _answer(self, send: Send) -> None:
        if self._timeout is None:
            await self._answer_unhurried(send, lambda: None)
            return
        try:
            async with asyncio.timeout(shortly_before(self._timeout)) as clock:
                await self._answer_unhurried(send, lambda: clock.reschedule(None))
        except TimeoutError:
            raise DeadlineExceeded(
                f"The upstream did not answer within the {self._timeout:.3g} s that the client "
                "waits; allow more time."
            ) from None

    async def _answer_unhurried(self, send: Send, on_pieces: Callable[[], None]) -> None:
        """Answer without a deadline; `on_pieces` is called if the answer comes in pieces."""
        async with self._engine.forward(self._request) as answer:
            content_type = answer.content_type
            if "json" in content_type:
                await self._send_whole(send, answer)
                return
            # Each piece of an answer starts the client's clock again.
            on_pieces()
            is_stream = content_type == EVENT_STREAM
            send_answer = self._send_stream if is_stream else _send_pieces
            await send_answer(send, answer)

    async def _send_whole(self, send: Send, answer: ForwardedAnswer) -> None:
        """Read the answer to its end, so that a failure on the way has its own status."""
        content = await answer.read()
        if self._request.path.startswith(RESPONSES) and answer.status in NO_ROUTE_STATUSES:
            self._check_route(content)
        if self._names:
            content = self._names.replaced(content)
        await send(_head(answer, len(content)))
        await send({"type": "http.response.body", "body": content})

    def _check_route(self, content: bytes) -> None:
        """Say what to use in place of the Responses API if the upstream does not have it.

        Raises:
            Unsupported: The error is that of a server without the route.
        """
        error = parse_error(content.decode(errors="replace"))
        is_generic = error.param is None and error.code is None
        if is_generic and NO_ROUTE_MESSAGE.fullmatch(error.message.rstrip(".")):
            path = self._request.path.partition("?")[0]
            raise Unsupported(
                f"{self._request.method} /v1{path}: the upstream does not serve this; "
                "use /v1/chat/completions.",
                code="not_served",
                status=404,
            )

    async def _send_stream(self, send: Send, answer: ForwardedAnswer) -> None:
        """Pass on a stream; if the upstream fails midway, end it with an error event."""
        await send(_head(answer))
        chunks = self._names.stream(answer.chunks) if self._names else answer.chunks
        try:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except AlignError as error:
            event = _error_event(error, self._request.path)
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _send_pieces(send: Send, answer: ForwardedAnswer) -> None:
    """Pass on an answer that may be large, such as audio; a failure midway cuts it off."""
    await send(_head(answer, answer.content_length))
    async for chunk in answer.chunks:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def _head(answer: ForwardedAnswer, length: int | None = None) -> Message:
    headers = answer.headers
    if length is not None:
        headers = [*headers, (b"content-length", b"%d" % length)]
    return {"type": "http.response.start", "status": answer.status, "headers": headers}


def _error_event(error: AlignError, path: str) -> bytes:
    """Return an error as the last event of a stream, in the format of its API."""
    if not path.startswith(RESPONSES):
        return b"data: " + dumps(error_json(error)) + b"\n\n"
    event = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
    return b"event: error\ndata: " + dumps(event) + b"\n\n"


class _Names:
    """Replaces the engine's name of a model by its name in the API."""

    def __init__(self, engine_model: str, name: str) -> None:
        quoted = re.escape(json.dumps(engine_model).encode())
        self._field = re.compile(rb'("model"\s*:\s*)' + quoted)
        self._name = json.dumps(name).encode()

    def replaced(self, content: bytes) -> bytes:
        """Return JSON with the other name. In a text of the answer, the quotes are escaped."""
        return self._field.sub(lambda match: match[1] + self._name, content)

    async def stream(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield the lines of a stream with the other name."""
        rest = b""
        async for chunk in chunks:
            content = rest + chunk
            # A line ends with LF, CR LF or CR alone.
            end = 1 + max(content.rfind(b"\n"), content.rfind(b"\r"))
            rest = content[end:]
            if end:
                yield self.replaced(content[:end])
        if rest:
            yield self.replaced(rest)


def waiting_time(service: Service, http: HttpRequest) -> float | None:
    """Return the seconds that the client waits for an answer, if that counts as a deadline."""
    if not service.config.server.honour_client_timeout:
        return None
    return client_timeout(headers_of(http))
