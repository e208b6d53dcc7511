"""One draw over an upstream: as few calls as it honours, each candidate finished once, nothing left running.

n candidates ─▶ batches of as many as a call gives ─▶ calls ─▶ choices; what a call left out is drawn one by one
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from infer_align.decoding.stream import (
    ChoiceBuilder,
    count_tokens,
    find_defect,
    is_json,
    split_proportionally,
    token_count,
)
from infer_align.engines import Stream
from infer_align.engines.openai.fanout import Fanout
from infer_align.errors import AlignError, InvalidRequest
from infer_align.types import Body, Candidate, Delta, Draw
from infer_align.upstream import UpstreamFailed
from infer_align.upstream.client import Client, CallCounter
from infer_align.upstream.pool import Host
from infer_align.upstream.response import read_events, read_json

PATHS = {"chat": "/chat/completions", "completion": "/completions"}
# What an answer holds beside its choices that is ours to say.
OURS = frozenset({"id", "object", "created", "model", "choices", "usage"})
DETAILS = ("prompt_tokens_details", "completion_tokens_details")


@dataclass(slots=True, eq=False)
class _Batch:
    """One call and its candidates."""

    indices: list[int]
    then: list[int] = field(
        default_factory=list
    )  # to be drawn once this call has shown whether the request or its n is refused
    counter: CallCounter = field(default_factory=CallCounter)
    known_good: bool = False  # the same request for one candidate was taken
    metered: bool = True  # whether a stream's usage may be asked for
    builders: dict[int, ChoiceBuilder] = field(
        default_factory=dict
    )  # place in the call -> what has come
    flaws: dict[int, str] = field(
        default_factory=dict
    )  # place in the call -> why it is no candidate
    ended: bool = False  # the upstream said that this was all
    usage: dict[str, Any] = field(default_factory=dict)
    response_fields: dict[str, Any] = field(default_factory=dict)
    host: Host | None = None  # that answered
    task: asyncio.Task[None] | None = None

    def calls(self) -> int:
        """Those made since this was last asked: the first candidate of a call reports it."""
        made, self.counter.calls = self.counter.calls, 0
        return made

    def finished(self, place: int) -> bool:
        """Whether that choice is complete."""
        return (
            place in self.builders
            and place not in self.flaws
            and (self.ended or self.builders[place].finished)
        )

    def prompt_tokens(self) -> int:
        """As the upstream counts them."""
        return token_count(self.usage.get("prompt_tokens")) or 0

    def sampled(self, done: dict[int, Body]) -> list[int]:
        """Tokens of each finished choice: the upstream's sum, shared by what each shows; where it gives none, what each shows."""
        shown = [
            max(count_tokens(choice), self.builders[place].text_chunks if self.streamed else 0)
            for place, choice in done.items()
        ]
        spent = token_count(self.usage.get("completion_tokens"))
        return shown if spent is None or not done else split_proportionally(spent, shown)

    @property
    def streamed(self) -> bool:
        """Whether the choices came in pieces."""
        return any(builder.text_chunks > 1 for builder in self.builders.values())

    def told(self) -> dict[str, Any]:
        """What stood beside the choices; for the first candidate that asks with the details of the usage, which are the call's."""
        details, self.usage = (
            {name: self.usage[name] for name in DETAILS if _mapping(self.usage.get(name))},
            self._without_details(),
        )
        return {**self.response_fields, **({"usage": details} if details else {})}

    def _without_details(self) -> dict[str, Any]:
        return {name: value for name, value in self.usage.items() if name not in DETAILS}


class Drawing:
    """One draw being sampled.

    Attributes:
        stream: what the caller reads.
    """

    def __init__(
        self,
        client: Client,
        fanout: Fanout,
        draw: Draw,
        model: str,
        ended: Callable[[Drawing], None],
    ) -> None:
        self.stream = Stream(draw.n, self.stop, self.close)
        self._client = client
        self._fanout = fanout
        self._draw = draw
        self._streamed = draw.deltas or draw.has_deadline
        self._model = model
        self._ended = ended
        self._left = set(range(draw.n))  # not finished yet
        self._place: dict[
            int, tuple[_Batch, int]
        ] = {}  # candidate -> its latest call, and its place there

    def start(self) -> None:
        """Make the first calls."""
        n = self._draw.n
        size = self._fanout.most(self._client.pool.serving(self._model), self._model, n)
        for start in range(0, n, size):
            self._begin(_Batch(list(range(start, min(start + size, n)))))

    def _begin(self, batch: _Batch) -> None:
        for place, index in enumerate(batch.indices):
            self._place[index] = batch, place
        for index in batch.then:
            self._place[index] = batch, -1
        batch.task = asyncio.create_task(self._run(batch))

    def close(self) -> None:
        """Break off every call; its connection is closed at once."""
        for batch, _ in self._place.values():
            if batch.task:
                batch.task.cancel()
        self._ended(self)

    def fail(self, error: AlignError) -> None:
        """End the draw by an error."""
        self.stream.put(error)
        self.close()

    def stop(self, index: int | None) -> None:
        """Finish now with what has come; a candidate of which nothing has come has failed by the deadline."""
        for i in tuple(self._left) if index is None else (index,):
            self._cut(i)
        for batch, _ in self._place.values():
            if batch.task and not self._left.intersection((*batch.indices, *batch.then)):
                batch.task.cancel()

    def _cut(self, index: int) -> None:
        batch, place = self._place[index]
        builder = batch.builders.get(place)
        if builder is None or not builder.text_chunks or place in batch.flaws:
            self._put(
                Candidate(
                    index,
                    {},
                    error="the upstream had said nothing when the time was over",
                    calls=batch.calls(),
                    interrupted=True,
                )
            )
            return
        choice, cut = builder.choice("length"), not builder.finished
        spent = max(count_tokens(choice), builder.text_chunks)
        self._put(
            Candidate(
                index, choice, 0, batch.prompt_tokens(), spent, calls=batch.calls(), interrupted=cut
            )
        )

    def _put(self, candidate: Candidate) -> None:
        if candidate.index in self._left:
            self._left.remove(candidate.index)
            self.stream.put(candidate)

    async def _run(self, batch: _Batch) -> None:
        try:
            await self._call(batch)
            self._complete(batch)
        except UpstreamFailed as error:
            self._failed(batch, error)
        except AlignError as error:
            self.fail(error)
        except Exception as error:
            self.fail(UpstreamFailed(f"the engine failed: {error!r}", status=500))
            raise

    async def _call(self, batch: _Batch) -> None:
        path, body = PATHS[self._draw.kind], self._body(batch)
        async with self._client.call(path, body, model=self._model, counter=batch.counter) as (
            host,
            response,
        ):
            batch.host = host
            if response.content_type == "text/event-stream":
                async for chunk in read_events(response):
                    self._read_chunk(batch, chunk)
            else:
                self._read_whole(batch, await read_json(response))

    def _body(self, batch: _Batch) -> dict[str, Any]:
        """The client's own, with what is ours: the model's name, n, seed and stream."""
        draw = self._draw
        body: dict[str, Any] = {**draw.body, "model": self._model}
        if len(batch.indices) > 1:
            body["n"] = len(batch.indices)
        if draw.seeds and draw.seed_requested:
            body["seed"] = draw.seeds[batch.indices[0]]
        if self._streamed:
            body["stream"] = True
            if batch.metered and self._model not in self._fanout.unmetered:
                body["stream_options"] = {"include_usage": True}
        return body

    def _read_whole(self, batch: _Batch, answer: Any) -> None:
        """An answer in one piece."""
        for place, choice in enumerate(_choices(answer)[: len(batch.indices)]):
            if (
                wrong := find_defect(self._draw.kind, choice)
                if isinstance(choice, dict)
                else "a choice without anything in it"
            ):
                batch.flaws[place] = wrong
                continue
            batch.builders[place] = ChoiceBuilder(self._draw.kind)
            delta = batch.builders[place].set_complete(choice)
            if self._streamed and batch.indices[place] in self._left:
                self.stream.put(Delta(batch.indices[place], delta))
        batch.usage = _mapping(answer.get("usage"))
        batch.response_fields = _beside(answer)

    def _read_chunk(self, batch: _Batch, chunk: Any) -> None:
        """A piece of a streamed answer; None says that this was all."""
        if chunk is None:
            batch.ended = True
            return
        _raise_if_error(chunk)
        batch.usage = _mapping(chunk.get("usage")) or batch.usage
        batch.response_fields |= _beside(chunk)
        choices = chunk.get("choices")
        if not isinstance(choices, list | None):
            raise UpstreamFailed("the upstream's stream holds no choices.")
        for choice in choices or ():
            place = choice.get("index", 0) if isinstance(choice, dict) else None
            if (
                isinstance(place, int)
                and 0 <= place < len(batch.indices)
                and place not in batch.flaws
            ):
                self._read_piece(batch, place, choice)

    def _read_piece(self, batch: _Batch, place: int, choice: dict[str, Any]) -> None:
        if wrong := find_defect(self._draw.kind, choice, streamed=True):
            batch.flaws[place] = wrong
            return
        if place not in batch.builders:
            batch.builders[place] = ChoiceBuilder(self._draw.kind)
        piece, index = batch.builders[place].add(choice), batch.indices[place]
        if piece is not None and index in self._left:
            self.stream.put(Delta(index, piece))

    def _complete(self, batch: _Batch) -> None:
        """The call has ended well: its choices are candidates, what broke off has failed, what it left out is drawn alone."""
        if not batch.builders and not batch.flaws:
            raise UpstreamFailed("the upstream's answer holds no choices.")
        self._finish(batch, "the upstream's stream ended before the answer did")
        came, asked = batch.builders.keys() | batch.flaws.keys(), len(batch.indices)
        if batch.host and asked > 1:
            self._fanout.learn(batch.host, self._model, asked, len(came))
        if self._streamed and not batch.metered:
            self._fanout.unmetered.add(self._model)
        for place, index in enumerate(batch.indices):
            if place not in came and index in self._left:
                self._begin(_Batch([index], known_good=True, metered=batch.metered))
        self._draw_others(batch)

    def _finish(
        self, batch: _Batch, why: str, status: int = 502, retry_after: float | None = None
    ) -> None:
        """What is complete is a candidate, what is flawed or was broken off has failed; what has not begun is left."""
        done = {
            place: batch.builders[place].choice("stop")
            for place in sorted(batch.builders)
            if batch.finished(place)
        }
        for (place, choice), spent in zip(done.items(), batch.sampled(done), strict=True):
            if (index := batch.indices[place]) in self._left:
                prompt, calls = batch.prompt_tokens(), batch.calls()
                self._put(
                    Candidate(
                        index, choice, 0, prompt, spent, calls=calls, response_fields=batch.told()
                    )
                )
        for place in sorted((batch.builders.keys() | batch.flaws.keys()) - done.keys()):
            wrong = batch.flaws.get(place)
            error = f"the upstream answered {wrong}." if wrong else why
            spent = batch.builders[place].text_chunks if place in batch.builders else 0
            failed = Candidate(
                batch.indices[place], {}, 0, 0, spent, error, 502 if wrong else status, retry_after
            )
            if failed.index in self._left:
                self._put(replace(failed, calls=batch.calls()))

    def _draw_others(self, batch: _Batch) -> None:
        """The request was refused for all of a batch, and its first has been asked alone."""
        others = [index for index in batch.then if index in self._left]
        size = self._fanout.chunk(
            self._client.pool.serving(self._model), self._model, len(batch.then) + 1
        )
        for start in range(0, len(others), size):
            self._begin(
                _Batch(others[start : start + size], known_good=True, metered=batch.metered)
            )

    def _failed(self, batch: _Batch, error: UpstreamFailed) -> None:
        """The call has not ended well: a wrong request is wrong for all, a failure is its candidates' own."""
        told, wanted = (
            f"{error.param} {error.message}",
            [index for index in batch.indices if index in self._left],
        )
        several = len(batch.indices) > 1 and len(wanted) > 0
        if error.refused and "stream_options" in told and self._streamed and batch.metered:
            # Perhaps it is this that is refused, perhaps a text that names it: what comes back without it tells.
            self._begin(
                _Batch(
                    wanted or batch.indices[:1],
                    batch.then,
                    batch.counter,
                    batch.known_good,
                    metered=False,
                )
            )
            return
        if error.refused and several and batch.known_good:
            half = (len(wanted) + 1) // 2
            self._begin(
                _Batch(wanted[:half], [], batch.counter, known_good=True, metered=batch.metered)
            )
            if wanted[half:]:
                self._begin(_Batch(wanted[half:], known_good=True, metered=batch.metered))
            return
        if error.refused and several and self._fanout.doubtful:
            # Is it the number that is refused, or the request? The first, asked alone, tells.
            first, *others = wanted
            self._begin(_Batch([first], others, batch.counter, metered=batch.metered))
            return
        if error.refused and not batch.known_good:
            self.fail(refusal(error))
            return
        status = 400 if error.status == 422 else error.status
        self._finish(batch, error.message, status, error.retry_after)
        for index in batch.indices:
            failed = Candidate(
                index, {}, error=error.message, status=status, retry_after=error.retry_after
            )
            if index in self._left:
                self._put(replace(failed, calls=batch.calls()))
        self._draw_others(batch)


def refusal(error: UpstreamFailed) -> InvalidRequest:
    """What the client is told where the upstream refuses its request."""
    status = (
        400 if error.status == 422 else error.status
    )  # 422 is what OpenAI's clients do not expect
    code = None if error.code == UpstreamFailed.code else error.code
    return InvalidRequest(error.message, param=error.param, code=code, status=status)


def _choices(answer: Any) -> list[Any]:
    _raise_if_error(answer)
    choices = answer.get("choices")
    if not isinstance(choices, list):
        raise UpstreamFailed("the upstream's answer holds no choices.")
    return sorted(choices, key=_index)


def _index(choice: Any) -> int:
    index = choice.get("index", 0) if isinstance(choice, dict) else 0
    return index if isinstance(index, int) else 0


def _beside(answer: dict[str, Any]) -> dict[str, Any]:
    """What an answer holds beside its choices that can be passed on."""
    return {key: value for key, value in answer.items() if key not in OURS and is_json(value)}


def _raise_if_error(answer: Any) -> None:
    """Some servers say 200 and mean an error."""
    if not isinstance(answer, dict):
        raise UpstreamFailed(f"the upstream's answer is {str(answer)[:40]!r}, not an object.")
    if error := answer.get("error"):
        told = error.get("message") if isinstance(error, dict) else error
        raise UpstreamFailed(str(told))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
