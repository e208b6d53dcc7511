"""One draw on vLLM: a request per candidate, each with its own seed, each to be stopped alone.

A request goes through vLLM's OpenAI layer, so a candidate's choice is what vLLM itself would have answered.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from infer_align.engines import Stream
from infer_align.engines.vllm.body import parsed
from infer_align.engines.vllm.pieces import Pieces
from infer_align.engines.vllm.watching import Fetcher, Named
from infer_align.errors import AlignError, EngineFailed
from infer_align.types import Candidate, Delta, Draw, Estimate

if TYPE_CHECKING:
    from infer_align.vllm.openai import Frontend, Job

log = logging.getLogger("infer_align")

ABORT_AGAIN_SECONDS = 0.05


class Sampling:
    """The requests of one draw, running."""

    def __init__(
        self,
        engine: Any,
        frontend: Frontend,
        draw: Draw,
        extra_args: Mapping[str, Any],
        fetcher: Fetcher,
    ) -> None:
        from infer_align.vllm.openai import Job  # noqa: PLC0415 - vLLM is running by now

        self.stream = Stream(draw.n, self._stop, self.close)
        self._engine = engine
        self._frontend = frontend
        self._draw = draw
        self._watched = (
            [Named(uuid.uuid4().hex, draw.estimates) for _ in range(draw.n)]
            if draw.estimates
            else []
        )
        watches: list[dict[str, Any]] = [named.extra_args() for named in self._watched] or [
            {}
        ] * draw.n
        self._jobs: list[Job] = [Job({**extra_args, **watch}) for watch in watches]
        self._fetcher = fetcher
        self._cut: set[int] = set()
        self._aborts: set[asyncio.Task[None]] = set()
        self._ended = False
        self._tasks: list[asyncio.Task[None]] = []
        self._main = asyncio.create_task(self._run())
        for i, named in enumerate(self._watched):
            fetcher.add(named, partial(self._sampled, i), partial(self._estimated, i))
        self._main.add_done_callback(lambda _: fetcher.discard(name for name, _ in self._watched))

    def on_end(self, done: Callable[[Sampling], None]) -> None:
        """Have `done` called when nothing of it runs any more."""
        self._main.add_done_callback(lambda _: done(self))

    def close(self) -> None:
        """Cancel everything; vLLM drops what a cancelled request was doing."""
        self._ended = True
        for task in (self._main, *self._tasks):
            task.cancel()

    def _sampled(self, index: int) -> int:
        from infer_align.vllm.compat import sampled_tokens  # noqa: PLC0415 - vLLM is running by now

        return sampled_tokens(self._engine, self._jobs[index].request_id)

    def _estimated(self, index: int, tokens: int, value: float) -> None:
        self.stream.put(Estimate(index, tokens, value))

    def _stop(self, index: int | None) -> None:
        for i in range(self._draw.n) if index is None else [index]:
            if i in self._cut or (self._tasks and self._tasks[i].done()):
                continue
            self._cut.add(i)
            self._aborts.add(abort := asyncio.create_task(self._abort(i)))
            abort.add_done_callback(self._aborts.discard)

    async def _abort(self, index: int) -> None:
        """Again until it is gone: a request that is just on its way to the engine is not there to be aborted yet."""
        while not self._main.done() and not (self._tasks and self._tasks[index].done()):
            if request_id := self._jobs[index].request_id:
                await self._engine.abort(request_id)
            await asyncio.sleep(ABORT_AGAIN_SECONDS)

    async def _run(self) -> None:
        draw = self._draw
        try:
            request = parsed(
                self._frontend,
                draw,
                **({"stream": True, "stream_options": USAGE} if draw.deltas else {}),
            )
            if draw.n > 1:
                rendered = await self._frontend.render(draw.kind, request)
                for job in self._jobs:
                    job.rendered = rendered
        except AlignError as error:
            self.stream.put(error)
            return
        self._tasks = [asyncio.create_task(self._guarded(i, request)) for i in range(draw.n)]
        await asyncio.gather(*self._tasks)

    async def _guarded(self, index: int, request: Any) -> None:
        try:
            await self._candidate(index, request)
        except EngineFailed as error:  # this one; the others go on
            if not self._ended:
                cut = (
                    index in self._cut
                )  # aborted before its first token, it may have nothing that could be formatted
                self.stream.put(
                    Candidate(index, {}, error=error.message, status=error.status, interrupted=cut)
                )
        except AlignError as error:  # all of them: the request is at fault, or the engine is gone
            if not self._ended:
                self.stream.put(error)
        except Exception as error:
            log.exception("a candidate failed")
            self.stream.put(EngineFailed(f"{type(error).__name__}: {error}", status=500))

    async def _candidate(self, index: int, request: Any) -> None:
        draw = self._draw
        seed = {"seed": draw.seeds[index]} if draw.seed_requested else {}
        own = request.model_copy(update={"request_id": uuid.uuid4().hex, **seed})
        answer = await self._frontend.answer(draw.kind, own, self._jobs[index])
        if draw.deltas:
            pieces = Pieces(draw.kind)
            async for chunk in _chunks(answer):
                if (delta := pieces.add(chunk)) is not None:
                    self.stream.put(Delta(index, delta))
            choice, usage = pieces.choice, pieces.usage
        else:
            choice, usage = answer.choices[0].model_dump(), answer.usage.model_dump()
            del choice["index"]
        if (
            self._watched
        ):  # who is compared must not depend on what came first, the end or the estimate before it
            await self._fetcher.flush()
        cut = index in self._cut and choice["finish_reason"] in {"abort", None}
        if choice["finish_reason"] == "abort":
            choice["finish_reason"] = "length"
        self.stream.put(
            Candidate(
                index,
                choice,
                0,
                usage["prompt_tokens"],
                usage["completion_tokens"],
                interrupted=cut,
            )
        )


USAGE = {"include_usage": True}


async def _chunks(events: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    """vLLM's server-sent events, read.

    Raises:
        AlignError: the error that one of them holds.
    """
    from infer_align.vllm.compat import refused  # noqa: PLC0415 - vLLM is running by now

    async for event in events:
        data = event.removeprefix("data: ").rstrip()
        if data == "[DONE]" or data.startswith(":"):
            continue
        chunk: dict[str, Any] = json.loads(data)
        if error := chunk.get("error"):
            raise refused(error)
        yield chunk
