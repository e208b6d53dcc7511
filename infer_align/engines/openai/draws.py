"""One draw from an upstream: as few calls as it allows, each candidate finished once.

    candidates ─▶ batches (batch_size.py) ─▶ calls ─▶ choices (batch.py) ─▶ Stream

A choice that a call does not return is requested again alone. A refused call is repeated in the
form that `_Reaction` names. Nothing that an upstream may have charged is requested twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any

from infer_align.decoding.stream import count_tokens, estimate_tokens
from infer_align.engines import Stream
from infer_align.engines.openai.batch import Batch
from infer_align.engines.openai.batch_size import BatchSizes
from infer_align.errors import AlignError, InvalidRequest
from infer_align.messages import message_text
from infer_align.types import Candidate, Delta, Draw
from infer_align.upstream import UpstreamFailed
from infer_align.upstream.client import CallCounter, Client
from infer_align.upstream.response import read_events, read_json

PATHS = {"chat": "/chat/completions", "completion": "/completions"}


class _Reaction(Enum):
    """Reactions to a failed call."""

    # The upstream may reject `stream_options`: repeat the call without it.
    OMIT_USAGE = auto()
    # One candidate is accepted, so n must be too large: request two halves.
    HALVE = auto()
    # The request or the number may be wrong: request the first candidate alone to find out.
    FIRST_ALONE = auto()
    # The request is wrong: every candidate would fail.
    FAIL_DRAW = auto()
    # Only the candidates of this call have failed.
    FAIL_BATCH = auto()


class UpstreamDrawing:
    """One draw being sampled.

    Args:
        client: the upstreams.
        sizes: how many candidates a call may request.
        draw: the draw.
        model: the upstream's name of the model.
        on_close: called with this drawing when it is closed.

    Attributes:
        stream: the events of the draw, for the caller.
    """

    def __init__(
        self,
        client: Client,
        sizes: BatchSizes,
        draw: Draw,
        model: str,
        on_close: Callable[[UpstreamDrawing], None],
    ) -> None:
        self.stream = Stream(draw.n, self.stop, self.close)
        self._client = client
        self._sizes = sizes
        self._draw = draw
        self._streamed = draw.deltas or draw.has_deadline
        self._model = model
        self._on_close = on_close
        self._unfinished = set(range(draw.n))
        # An upstream counts the prompt at the end of a call. A call that ends early has no count.
        self._reported_prompt_tokens: int | None = None
        # Candidate -> its latest call and its position there; no position while it waits.
        self._batches: dict[int, tuple[Batch, int | None]] = {}

    def start(self) -> None:
        """Make the first calls."""
        indices = list(range(self._draw.n))
        hosts = self._client.pool.serving(self._model)
        size = self._sizes.limit(hosts, self._model, len(indices))
        for part in _parts(indices, size):
            self._begin(Batch(self._draw.kind, part))

    def close(self) -> None:
        """Cancel every call; its connection is closed at once."""
        for batch, _ in self._batches.values():
            if batch.task:
                batch.task.cancel()
        self._on_close(self)

    def fail(self, error: AlignError) -> None:
        """End the draw with an error."""
        self.stream.put(error)
        self.close()

    def stop(self, index: int | None) -> None:
        """Finish candidate `index`, or all, with the text that has come."""
        for each in tuple(self._unfinished) if index is None else (index,):
            self._interrupt(each)
        for batch, _ in self._batches.values():
            if batch.task and not self._unfinished.intersection((*batch.indices, *batch.waiting)):
                batch.task.cancel()

    def _interrupt(self, index: int) -> None:
        batch, position = self._batches[index]
        partial = None if position is None else batch.partial_choice(position)
        if position is None or partial is None:
            error = "the upstream had returned no text when the time was over"
            calls = batch.take_calls()
            self._put(Candidate(index, {}, error=error, calls=calls, interrupted=True))
            return
        choice, incomplete = partial
        candidate = Candidate(
            index,
            choice,
            prompt_tokens=self._prompt_tokens(batch),
            completion_tokens=max(count_tokens(choice), batch.chunk_count(position)),
            calls=batch.take_calls(),
            interrupted=incomplete,
        )
        self._put(candidate)

    def _prompt_tokens(self, batch: Batch) -> int:
        """Return the tokens of the prompt, as an upstream counts them, or an estimate."""
        reported = batch.prompt_tokens()
        if reported is not None:
            self._reported_prompt_tokens = reported
        if self._reported_prompt_tokens is not None:
            return self._reported_prompt_tokens
        return _estimated_prompt_tokens(self._draw)

    def _put(self, candidate: Candidate) -> None:
        if candidate.index in self._unfinished:
            self._unfinished.remove(candidate.index)
            self.stream.put(candidate)

    # --- one call ---

    def _begin(self, batch: Batch) -> None:
        for position, index in enumerate(batch.indices):
            self._batches[index] = batch, position
        for index in batch.waiting:
            self._batches[index] = batch, None
        batch.task = asyncio.create_task(self._run(batch))

    async def _run(self, batch: Batch) -> None:
        try:
            await self._call(batch)
            self._complete(batch)
        except UpstreamFailed as error:
            self._handle_failure(batch, error)
        except AlignError as error:
            self.fail(error)
        except Exception as error:
            self.fail(UpstreamFailed(f"the engine failed: {error!r}", status=500))
            raise

    async def _call(self, batch: Batch) -> None:
        path = PATHS[self._draw.kind]
        body = self._body(batch)
        async with self._client.call(path, body, model=self._model, counter=batch.counter) as (
            host,
            response,
        ):
            batch.host = host
            if response.content_type == "text/event-stream":
                async for chunk in read_events(response):
                    self._put_deltas(batch.read_chunk(chunk))
                return
            deltas = batch.read_answer(await read_json(response))
            if self._streamed:
                self._put_deltas(deltas)

    def _body(self, batch: Batch) -> dict[str, Any]:
        """Return the client's body with the model's name, n, seed and stream of this call."""
        draw = self._draw
        body: dict[str, Any] = {**draw.body, "model": self._model}
        if len(batch.indices) > 1:
            body["n"] = len(batch.indices)
        if draw.seeds and draw.seed_requested:
            body["seed"] = draw.seeds[batch.indices[0]]
        if self._streamed:
            body["stream"] = True
            if batch.request_usage and self._model not in self._sizes.models_without_usage:
                body["stream_options"] = {"include_usage": True}
        return body

    def _put_deltas(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            if delta.index in self._unfinished:
                self.stream.put(delta)

    # --- the end of a call ---

    def _complete(self, batch: Batch) -> None:
        """Finish the candidates of a call that has ended well, and request what it left out."""
        returned = batch.begun
        if not returned:
            raise UpstreamFailed("the upstream's answer holds no choices.")
        cut_short = UpstreamFailed("the upstream's stream ended before the answer did")
        self._finish_begun(batch, cut_short)
        if batch.host and len(batch.indices) > 1:
            self._sizes.learn(batch.host, self._model, len(batch.indices), len(returned))
        if self._streamed and not batch.request_usage:
            self._sizes.models_without_usage.add(self._model)
        for position, index in enumerate(batch.indices):
            if position not in returned and index in self._unfinished:
                self._begin(self._accepted_batch(batch, [index]))
        self._begin_waiting(batch)

    def _finish_begun(self, batch: Batch, error: UpstreamFailed) -> None:
        """Finish the choices that have begun: complete ones as candidates, others as failed."""
        choices = batch.finished_choices()
        completion_tokens = batch.completion_tokens(choices)
        for position, choice in choices.items():
            index = batch.indices[position]
            if index not in self._unfinished:
                continue
            candidate = Candidate(
                index,
                choice,
                prompt_tokens=self._prompt_tokens(batch),
                completion_tokens=completion_tokens[position],
                calls=batch.take_calls(),
                response_fields=batch.take_response_fields(),
            )
            self._put(candidate)
        for position in sorted(batch.begun - choices.keys()):
            reason = error
            if position in batch.defects:
                message = f"the upstream answered {batch.defects[position]}."
                reason = UpstreamFailed(message, retry_after=error.retry_after)
            self._fail_candidate(batch, position, reason)

    def _fail_candidate(self, batch: Batch, position: int, error: UpstreamFailed) -> None:
        index = batch.indices[position]
        if index not in self._unfinished:
            return
        candidate = Candidate(
            index,
            {},
            completion_tokens=batch.chunk_count(position),
            error=error.message,
            status=_client_status(error),
            retry_after=error.retry_after,
            calls=batch.take_calls(),
        )
        self._put(candidate)

    def _begin_waiting(self, batch: Batch) -> None:
        """Request the candidates that waited for a call of one candidate to end."""
        waiting = [index for index in batch.waiting if index in self._unfinished]
        hosts = self._client.pool.serving(self._model)
        size = self._sizes.after_refusal(hosts, self._model, len(batch.waiting) + 1)
        for part in _parts(waiting, size):
            self._begin(self._accepted_batch(batch, part))

    def _accepted_batch(
        self, batch: Batch, indices: list[int], counter: CallCounter | None = None
    ) -> Batch:
        """Return a batch for a request that an upstream accepted for one candidate."""
        return Batch(
            self._draw.kind,
            indices,
            counter=counter,
            accepted_for_one=True,
            request_usage=batch.request_usage,
        )

    # --- failures ---

    def _handle_failure(self, batch: Batch, error: UpstreamFailed) -> None:
        match self._reaction(batch, error):
            case _Reaction.OMIT_USAGE:
                self._repeat_without_usage(batch)
            case _Reaction.HALVE:
                self._halve(batch)
            case _Reaction.FIRST_ALONE:
                self._try_first_alone(batch)
            case _Reaction.FAIL_DRAW:
                self.fail(refusal(error))
            case _Reaction.FAIL_BATCH:
                self._fail_batch(batch, error)

    def _reaction(self, batch: Batch, error: UpstreamFailed) -> _Reaction:
        if not error.refused:
            return _Reaction.FAIL_BATCH
        mentions_stream_options = "stream_options" in f"{error.param} {error.message}"
        if mentions_stream_options and self._streamed and batch.request_usage:
            return _Reaction.OMIT_USAGE
        unfinished = self._unfinished.intersection(batch.indices)
        can_be_divided = len(batch.indices) > 1 and bool(unfinished)
        if can_be_divided:
            if batch.accepted_for_one:
                return _Reaction.HALVE
            if self._sizes.may_refuse_because_of_n:
                return _Reaction.FIRST_ALONE
        return _Reaction.FAIL_BATCH if batch.accepted_for_one else _Reaction.FAIL_DRAW

    def _unfinished_of(self, batch: Batch) -> list[int]:
        return [index for index in batch.indices if index in self._unfinished]

    def _repeat_without_usage(self, batch: Batch) -> None:
        # The message may name the option because the client's text does. Only a call that works
        # without it shows that the upstream rejects it.
        repeated = Batch(
            self._draw.kind,
            self._unfinished_of(batch) or batch.indices[:1],
            waiting=batch.waiting,
            counter=batch.counter,
            accepted_for_one=batch.accepted_for_one,
            request_usage=False,
        )
        self._begin(repeated)

    def _halve(self, batch: Batch) -> None:
        unfinished = self._unfinished_of(batch)
        middle = (len(unfinished) + 1) // 2
        # A candidate of the first half reports the refused call.
        self._begin(self._accepted_batch(batch, unfinished[:middle], batch.counter))
        if unfinished[middle:]:
            self._begin(self._accepted_batch(batch, unfinished[middle:]))

    def _try_first_alone(self, batch: Batch) -> None:
        first, *remaining = self._unfinished_of(batch)
        alone = Batch(
            self._draw.kind,
            [first],
            waiting=remaining,
            counter=batch.counter,
            request_usage=batch.request_usage,
        )
        self._begin(alone)

    def _fail_batch(self, batch: Batch, error: UpstreamFailed) -> None:
        """Fail the candidates of a call; its complete choices still count."""
        self._finish_begun(batch, error)
        for position in range(len(batch.indices)):
            self._fail_candidate(batch, position, error)
        self._begin_waiting(batch)


def refusal(error: UpstreamFailed) -> InvalidRequest:
    """Return the error for a client whose request an upstream refuses."""
    code = None if error.code == UpstreamFailed.code else error.code
    return InvalidRequest(error.message, param=error.param, code=code, status=_client_status(error))


def _client_status(error: UpstreamFailed) -> int:
    """Return the status for the client: OpenAI's clients do not expect 422."""
    return 400 if error.status == 422 else error.status


def _estimated_prompt_tokens(draw: Draw) -> int:
    if draw.kind == "chat":
        return estimate_tokens([message_text(message) for message in draw.body.get("messages", ())])
    prompt = draw.body.get("prompt", "")
    return len(prompt) if isinstance(prompt, list) else estimate_tokens([str(prompt)])


def _parts(indices: Sequence[int], size: int) -> list[list[int]]:
    """Divide the indices into parts of at most `size`."""
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]
