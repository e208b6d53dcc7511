"""A running draw on vLLM: one request per candidate, with its own seed and its own abort.

Every request goes through vLLM's OpenAI layer, so a candidate's choice is exactly what vLLM's own
server would answer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from infer_align.engines import Stream
from infer_align.engines.vllm.body import Bodies
from infer_align.engines.vllm.chunks import StreamedChoice, parse_chunks
from infer_align.engines.vllm.estimates import EstimateFetcher
from infer_align.engines.vllm.extra_args import EstimateRequest
from infer_align.errors import AlignError, EngineFailed
from infer_align.types import USAGE_DETAILS, Candidate, Delta, Draw, Estimate
from infer_align.vllm.interfaces import CandidateCall, Completion

if TYPE_CHECKING:
    from pydantic import BaseModel

    from infer_align.vllm.openai import Frontend

log = logging.getLogger("infer_align")

ABORT_RETRY_SECONDS = 0.05


class RunningDraw:
    """The requests of one draw.

    Attributes:
        stream: the deltas, estimates and candidates of the draw.
    """

    def __init__(
        self,
        frontend: Frontend,
        bodies: Bodies,
        draw: Draw,
        extra_args: Mapping[str, Any],
        fetcher: EstimateFetcher,
    ) -> None:
        """Start the requests.

        Args:
            frontend: vLLM's OpenAI layer.
            bodies: parses the draw's body.
            draw: what to sample.
            extra_args: the steering, for SamplingParams.extra_args of each request.
            fetcher: delivers the estimates if the draw needs any.
        """
        self.stream = Stream(draw.n, self._stop, self.close)
        self._frontend = frontend
        self._bodies = bodies
        self._draw = draw
        self._fetcher = fetcher
        self._estimates: list[EstimateRequest] = []
        if draw.estimates:
            for _ in range(draw.n):
                self._estimates.append(EstimateRequest(uuid.uuid4().hex, draw.estimates))
        self._calls = [CandidateCall(extra_args) for _ in range(draw.n)]
        for call, request in zip(self._calls, self._estimates, strict=False):
            call.extra_args = {**extra_args, **request.write()}
        self._stopped: set[int] = set()
        self._aborts: set[asyncio.Task[None]] = set()
        self._closed = False
        self._candidates: list[asyncio.Task[None]] = []
        self._main = asyncio.create_task(self._run())
        self._subscribe()

    def _subscribe(self) -> None:
        """Have estimates delivered for as long as the draw runs."""
        for index, request in enumerate(self._estimates):
            token_count = partial(self._frontend.generated_tokens, self._calls[index])
            self._fetcher.add(request, token_count, partial(self._put_estimate, index))
        keys = [request.key for request in self._estimates]
        self._main.add_done_callback(lambda _: self._fetcher.discard(keys))

    def on_end(self, callback: Callable[[RunningDraw], None]) -> None:
        """Call `callback` when all requests have ended."""
        self._main.add_done_callback(lambda _: callback(self))

    def close(self) -> None:
        """Cancel all requests; vLLM aborts them."""
        self._closed = True
        for task in (self._main, *self._candidates):
            task.cancel()

    def _put_estimate(self, index: int, tokens: int, value: float) -> None:
        self.stream.put(Estimate(index, tokens, value))

    def _stop(self, index: int | None) -> None:
        """Abort one candidate, or all if `index` is None."""
        indices = range(self._draw.n) if index is None else [index]
        for i in indices:
            if i in self._stopped or self._has_ended(i):
                continue
            self._stopped.add(i)
            abort = asyncio.create_task(self._abort(i))
            self._aborts.add(abort)
            abort.add_done_callback(self._aborts.discard)

    def _has_ended(self, index: int) -> bool:
        return bool(self._candidates) and self._candidates[index].done()

    async def _abort(self, index: int) -> None:
        """Abort a candidate until it ends. A request that the engine lacks yet is not aborted."""
        while not self._main.done() and not self._has_ended(index):
            await self._frontend.abort(self._calls[index])
            await asyncio.sleep(ABORT_RETRY_SECONDS)

    async def _run(self) -> None:
        draw = self._draw
        try:
            request = self._bodies.take(draw)
            if draw.n > 1:
                # Render the prompt once for all candidates.
                prompt = await self._frontend.render(draw.kind, request)
                for call in self._calls:
                    call.prompt = prompt
        except AlignError as error:
            self.stream.put(error)
            return
        if draw.n == 1:
            # Without a task of its own, it starts and ends sooner.
            await self._run_candidate(0, request)
            return
        for index in range(draw.n):
            self._candidates.append(asyncio.create_task(self._run_candidate(index, request)))
        await asyncio.gather(*self._candidates)

    async def _run_candidate(self, index: int, request: BaseModel) -> None:
        """Generate one candidate. Its failure is reported on the stream, never raised."""
        try:
            await self._generate(index, request)
        except EngineFailed as error:
            # Only this candidate failed. One that was stopped before its first token may have
            # nothing that vLLM could format.
            if not self._closed:
                self.stream.put(
                    Candidate(
                        index,
                        {},
                        error=error.message,
                        status=error.status,
                        interrupted=index in self._stopped,
                    )
                )
        except AlignError as error:
            # All candidates fail: the request is invalid, or the engine has died.
            if not self._closed:
                self.stream.put(error)
        except Exception as error:
            log.exception("a candidate failed")
            self.stream.put(EngineFailed(f"{type(error).__name__}: {error}", status=500))

    async def _generate(self, index: int, request: BaseModel) -> None:
        draw = self._draw
        changes: dict[str, Any] = {"request_id": os.urandom(16).hex()}
        if draw.seed_requested:
            changes["seed"] = draw.seeds[index]
        request = request.model_copy(update=changes)
        if draw.deltas:
            choice, usage, fields = await self._stream_choice(index, request)
        else:
            completion = await self._frontend.complete(draw.kind, request, self._calls[index])
            choice, usage, fields = completion
        if self._estimates:
            # Deliver the estimates before the end, so that the outcome of a comparison does not
            # depend on which of the two arrives first.
            await self._fetcher.flush()
        interrupted = index in self._stopped and choice["finish_reason"] in {"abort", None}
        if choice["finish_reason"] == "abort":
            choice["finish_reason"] = "length"
        self.stream.put(
            Candidate(
                index,
                choice,
                0,
                usage["prompt_tokens"],
                usage["completion_tokens"],
                interrupted=interrupted,
                response_fields={**fields, "usage": _details(usage, index)},
            )
        )

    async def _stream_choice(self, index: int, request: BaseModel) -> Completion:
        """Put the deltas of one candidate on the stream; return what it became."""
        kind = self._draw.kind
        events = await self._frontend.stream(kind, request, self._calls[index])
        streamed = StreamedChoice(kind)
        async for chunk in parse_chunks(events):
            delta = streamed.add(chunk)
            if delta is not None:
                self.stream.put(Delta(index, delta))
        return Completion(streamed.choice, streamed.usage, streamed.fields)


def _details(usage: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return the details of a candidate's token counts.

    The candidates share their prompt, which counts once: so do its details.
    """
    names = {"completion_tokens_details"} if index else set(USAGE_DETAILS)
    return {name: usage[name] for name in names if usage.get(name)}
