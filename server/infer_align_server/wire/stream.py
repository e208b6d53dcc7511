"""Server-sent events: tokens as they are sampled, or the selected message in ordinary chunks.

What a client leaves is cancelled at once, in streams and plain answers alike.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from time import monotonic
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.types import Receive, Scope, Send

from infer_align.decoding.stream import message_delta
from infer_align.errors import AlignError
from infer_align.types import Candidate, Delta, Plan, Request, Response
from infer_align_server.service import Service
from infer_align_server.wire.completion import OBJECTS, align_json, usage_json
from infer_align_server.wire.disconnect import until_client_leaves
from infer_align_server.wire.encoding import dumps
from infer_align_server.wire.errors import error_json
from infer_align_server.wire.stream_options import StreamOptions

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
KEEPALIVE = b": candidates are being compared\n\n"
LEAST_KEEPALIVE_SECONDS = 0.25
# What a chunk's choice always has; whatever else an engine puts there is passed on once.
USUAL = frozenset({"delta", "message", "text", "logprobs", "finish_reason"})


class EventStream(HttpResponse):
    """One streamed answer: `open` starts it, then it is the HTTP response."""

    def __init__(
        self,
        service: Service,
        request: Request,
        plan: Plan,
        head: Mapping[str, Any],
        options: StreamOptions,
        caller: str = "",
        patience: float | None = None,
    ) -> None:
        super().__init__()
        self._caller = caller
        # A client that waits less long between two pieces hears from us before it gives up; but nobody can ask for a flood.
        needed = math.inf if patience is None else max(LEAST_KEEPALIVE_SECONDS, patience / 2)
        self._keepalive = min(service.config.server.keepalive_seconds, needed)
        self._service = service
        self._request = request
        self._plan = plan
        self._head = {**head, "object": OBJECTS[request.kind][2]}
        self._include_usage = options.include_usage
        self._queue: asyncio.Queue[Delta | None] = (
            asyncio.Queue()
        )  # None: the answer is complete, or has failed
        self._early: list[Delta | None] = []  # taken from the queue while it was not yet a stream
        self._opened: set[int] = set()  # choices that have sent their role
        self._told: dict[int, set[str]] = {}  # further fields that a choice has sent
        self._arrived = monotonic()
        self._first = 0.0

    async def open(self, http: HttpRequest) -> EventStream:
        """Begin, and wait for the first token, or long enough: an error until here is answered with its own status.

        Raises:
            AlignError: what `Service.answer` raises.
            ClientLeft: before the first token.
        """
        on_delta = None if self._plan.selects else self._queue.put_nowait
        self._task = asyncio.create_task(self._service.answer(self._plan, on_delta, self._caller))
        self._task.add_done_callback(lambda _: self._queue.put_nowait(None))
        try:
            await until_client_leaves(http.receive, self._first_sign())
            if self._task.done():
                self._task.result()
        except BaseException:
            self._task.cancel()
            await asyncio.wait({self._task})
            raise
        return self

    async def _first_sign(self) -> None:
        try:
            async with asyncio.timeout(self._keepalive):
                self._early = [await self._queue.get()]
        except TimeoutError:
            self._early = []  # slow, not failed: from here on it is a stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; the last chunk carries `align`, and usage where it was asked for."""
        try:
            await until_client_leaves(receive, self._send(send))
        finally:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        running = True
        while running:
            items, self._early = self._early, []
            try:
                async with asyncio.timeout(self._keepalive):
                    items = items or [await self._queue.get()]
            except TimeoutError:
                await self._write(send, KEEPALIVE)
                continue
            while not self._queue.empty():
                items.append(self._queue.get_nowait())
            running = items[-1] is not None
            self._first = self._first or monotonic()
            if chunks := b"".join(self._delta(item) for item in items if item is not None):
                await self._write(send, chunks)
        await self._write(send, self._ending(), more=False)

    async def _write(self, send: Send, data: bytes, *, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": more})

    def _delta(self, delta: Delta) -> bytes:
        if further := {key for key in delta.choice.keys() - USUAL if delta.choice[key] is not None}:
            self._told.setdefault(delta.index, set()).update(further)
        return self._role(delta.index) + self._chunk(
            {"index": delta.index, "logprobs": None, "finish_reason": None, **delta.choice}
        )

    def _role(self, index: int) -> bytes:
        if self._request.kind == "completion" or index in self._opened:
            return b""
        self._opened.add(index)
        return self._chunk(
            {
                "index": index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
        )

    def _chunk(self, choice: Mapping[str, Any] | None, **extra: object) -> bytes:
        usage = {"usage": None} if self._include_usage else {}
        return (
            b"data: "
            + dumps({**self._head, "choices": [] if choice is None else [choice], **usage, **extra})
            + b"\n\n"
        )

    def _ending(self) -> bytes:
        try:
            response = self._task.result()
        except AlignError as error:
            return b"data: " + dumps(error_json(error)) + b"\n\n"
        self._observe(response)
        kept = list(enumerate(response.returned))
        sent = (
            b"".join(self._whole(i, candidate) for i, candidate in kept)
            if self._plan.selects
            else b""
        )
        report = self._request.aligned and self._request.details != "none"
        extra: dict[str, Any] = {"align": align_json(response, self._request)} if report else {}
        for i, candidate in kept:
            last = extra if i == len(kept) - 1 and not self._include_usage else {}
            end = {
                **self._empty(),
                "finish_reason": candidate.finish_reason,
                **self._untold(i, candidate),
            }
            sent += self._role(i) + self._chunk({"index": i, **end}, **last)
        if self._include_usage:
            sent += self._chunk(None, usage=usage_json(response), **extra)
        return sent + b"data: [DONE]\n\n"

    def _empty(self) -> dict[str, Any]:
        return (
            {"delta": {}, "logprobs": None}
            if self._request.kind == "chat"
            else {"text": "", "logprobs": None}
        )

    def _untold(self, index: int, candidate: Candidate) -> dict[str, Any]:
        """What the engine said of a choice at its end, such as vLLM's stop_reason."""
        told = USUAL | self._told.get(index, set())
        return (
            {}
            if self._plan.selects
            else {key: value for key, value in candidate.choice.items() if key not in told}
        )

    def _whole(self, index: int, candidate: Candidate) -> bytes:
        """A finished message as one chunk: everything the engine put in it, tool calls and reasoning too."""
        choice = {key: value for key, value in candidate.choice.items() if key != "message"}
        choice["finish_reason"] = None
        if self._request.kind == "chat":
            choice["delta"] = message_delta(candidate.choice["message"])
        return self._role(index) + self._chunk({"index": index, **choice})

    def _observe(self, response: Response) -> None:
        metrics, ended = self._service.metrics, monotonic()
        metrics.ttft.observe(self._first - self._arrived)
        if len(response.candidates) == 1 and response.candidates[0].completion_tokens > 1:
            metrics.tpot.observe(
                (ended - self._first) / (response.candidates[0].completion_tokens - 1)
            )
