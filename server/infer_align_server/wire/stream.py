"""Streamed completions: deltas while the engine samples, or the selected candidates at the end."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.types import Receive, Scope, Send

from infer_align.errors import AlignError
from infer_align.flow.plan import Plan
from infer_align.flow.response import Response
from infer_align.types import Candidate, Delta
from infer_align_server.answering import answer_all
from infer_align_server.service import Service
from infer_align_server.wire.chunks import ChunkWriter
from infer_align_server.wire.disconnect import until_client_leaves
from infer_align_server.wire.stream_options import StreamOptions

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
MIN_KEEPALIVE_SECONDS = 0.25


class EventStream(HttpResponse):
    """The streamed response to one request. Call `open` first.

    Args:
        service: The service that answers.
        plans: The plans of the request, one per prompt.
        head: The fields `id`, `created` and `model` of each chunk.
        options: OpenAI's stream options.
        caller: The caller that pays for the tokens.
        client_timeout: The longest time in seconds that the client waits between two chunks; None
            if it is unknown.
    """

    def __init__(
        self,
        service: Service,
        plans: Sequence[Plan],
        head: Mapping[str, Any],
        options: StreamOptions,
        caller: str = "",
        client_timeout: float | None = None,
    ) -> None:
        super().__init__()
        self._service = service
        self._plans = plans
        self._selects = plans[0].selects
        self._caller = caller
        self._keepalive_seconds = _keepalive_seconds(service, client_timeout)
        self._writer = ChunkWriter(
            plans[0].request,
            head,
            streams_deltas=not self._selects,
            include_usage=options.include_usage,
        )
        # None marks the end: the response is complete or has failed.
        self._queue: asyncio.Queue[Delta | None] = asyncio.Queue()
        # Received by `open`, to be sent first.
        self._pending: list[Delta | None] = []
        self._arrival_time = monotonic()
        self._first_token_time = 0.0
        self._finished_candidates = 0

    async def open(self, http: HttpRequest) -> EventStream:
        """Start the work and wait for the first delta, or for the keepalive time.

        An error until then is a response with its own status.

        Returns:
            This response, ready to be sent.

        Raises:
            AlignError: See `answer_all`.
            ClientLeft: The client disconnected.
        """
        on_delta = None if self._selects else self._queue.put_nowait
        work = answer_all(self._service, self._plans, on_delta, self._caller, self._count_candidate)
        self._task = asyncio.create_task(work)
        self._task.add_done_callback(lambda _: self._queue.put_nowait(None))
        try:
            self._pending = await until_client_leaves(http.receive, self._receive())
            if self._task.done():
                self._task.result()
        except BaseException:
            await self._cancel()
            raise
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream.

        Raises:
            ClientLeft: The client disconnected.
        """
        try:
            await until_client_leaves(receive, self._send(send))
        finally:
            await self._cancel()

    async def _cancel(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _receive(self) -> list[Delta | None]:
        """Return the next delta or the end; nothing if there is none for the keepalive time."""
        try:
            async with asyncio.timeout(self._keepalive_seconds):
                return [await self._queue.get()]
        except TimeoutError:
            return []

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        items = self._pending
        running = True
        while running:
            items = items or await self._receive()
            if not items:
                await _send_body(send, self._comment())
                continue
            while not self._queue.empty():
                items.append(self._queue.get_nowait())
            running = items[-1] is not None
            self._first_token_time = self._first_token_time or monotonic()
            chunks = [self._writer.delta(item) for item in items if item is not None]
            if chunks:
                await _send_body(send, b"".join(chunks))
            items = []
        await _send_body(send, self._ending(), more=False)

    def _count_candidate(self, _: Candidate) -> None:
        self._finished_candidates += 1

    def _comment(self) -> bytes:
        """Return a comment, which clients ignore.

        It keeps the connection open while there is nothing to send, and tells a person who looks
        how far the work is.
        """
        finished = self._finished_candidates
        return f": candidates are being compared, {finished} are finished\n\n".encode()

    def _ending(self) -> bytes:
        try:
            responses = self._task.result()
        except AlignError as error:
            return self._writer.error(error)
        self._observe(responses)
        return self._writer.ending(responses)

    def _observe(self, responses: Sequence[Response]) -> None:
        """Record the time to first token, and the time per further token."""
        end_time = monotonic()
        metrics = self._service.metrics
        metrics.ttft.observe(self._first_token_time - self._arrival_time)
        candidates: list[Candidate] = []
        for response in responses:
            candidates += response.candidates
        if len(candidates) == 1:
            further_tokens = candidates[0].completion_tokens - 1
            if further_tokens > 0:
                metrics.tpot.observe((end_time - self._first_token_time) / further_tokens)


def _keepalive_seconds(service: Service, client_timeout: float | None) -> float:
    """Return the keepalive time: shorter than configured if the client's timeout needs it."""
    limit = math.inf
    if client_timeout is not None:
        # The minimum prevents that a client makes the server send comments without pause.
        limit = max(MIN_KEEPALIVE_SECONDS, client_timeout / 2)
    return min(service.config.server.keepalive_seconds, limit)


async def _send_body(send: Send, data: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})
