"""One draw over an upstream: as few calls as it honours, each candidate finished once, nothing left running.

n candidates ─▶ batches of as many as a call gives ─▶ calls ─▶ choices; what a call left out is drawn one by one
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from infer_align.engines import Stream
from infer_align.engines.openai.choices import ChoiceBuilder, shares, weight
from infer_align.errors import AlignError, InvalidRequest
from infer_align.types import Candidate, Delta, Draw
from infer_align.upstream import UpstreamFailed
from infer_align.upstream.client import Client, Tally, events, whole
from infer_align.upstream.pool import Host

PATHS = {"chat": "/chat/completions", "completion": "/completions"}
# What an answer holds beside its choices that is ours to say.
OURS = frozenset({"id", "object", "created", "model", "choices", "usage"})


class Fanout:
    """How many choices one call gives, by upstream and model, as it is found out.

    Args:
        mode: "native" always asks for all in one call, "single" never; "auto" asks, and remembers what came back.

    Attributes:
        unmetered: models whose upstream refuses to say the usage of a stream.
    """

    def __init__(self, mode: str) -> None:
        self.unmetered: set[str] = set()
        self._mode = mode
        self._most: dict[tuple[str, str], int] = {}

    def most(self, hosts: Sequence[Host], model: str, n: int) -> int:
        """How many of n to ask one call for, whichever of the hosts will take it."""
        if self._mode != "auto":
            return n if self._mode == "native" else 1
        return min([n, *(self._most.get((host.url, model), n) for host in hosts)])

    def learn(self, host: Host, model: str, got: int) -> None:
        """A call for more choices gave `got`."""
        self._most[host.url, model] = max(1, got)

    @property
    def doubtful(self) -> bool:
        """Whether a refused call for several may have been refused for their number."""
        return self._mode == "auto"


@dataclass(slots=True, eq=False)
class _Batch:
    """One call and its candidates."""

    indices: list[int]
    then: list[int] = field(default_factory=list)  # to be drawn one by one once this call has shown that it works
    tally: Tally = field(default_factory=Tally)
    builders: dict[int, ChoiceBuilder] = field(default_factory=dict)  # place in the call -> what has come
    ended: bool = False  # the upstream said that this was all
    usage: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)
    host: Host | None = None  # that answered
    task: asyncio.Task[None] | None = None

    def calls(self) -> int:
        """Those made since this was last asked: the first candidate of a call reports it."""
        made, self.tally.calls = self.tally.calls, 0
        return made

    def finished(self, place: int) -> bool:
        """Whether that choice is complete."""
        return place in self.builders and (self.ended or self.builders[place].finished)

    def prompt_tokens(self) -> int:
        """As the upstream counts them."""
        tokens = self.usage.get("prompt_tokens")
        return tokens if isinstance(tokens, int) else 0


class Drawing:
    """One draw being sampled.

    Attributes:
        stream: what the caller reads.
    """

    def __init__(self, client: Client, fanout: Fanout, draw: Draw, model: str, ended: Callable[[Drawing], None]) -> None:
        self.stream = Stream(draw.n, self.stop, self.close)
        self._client = client
        self._fanout = fanout
        self._draw = draw
        self._streamed = draw.deltas or draw.hurried
        self._model = model
        self._ended = ended
        self._left = set(range(draw.n))  # not finished yet
        self._place: dict[int, tuple[_Batch, int]] = {}  # candidate -> its latest call, and its place there

    def start(self) -> None:
        """Make the first calls."""
        n = self._draw.n
        size = self._fanout.most(self._client.pool.having(self._model), self._model, n)
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
        if builder is None or not builder.pieces:
            self._put(
                Candidate(index, {}, error="the upstream had said nothing when the time was over", calls=batch.calls(), cut=True)
            )
            return
        choice, cut = builder.choice("length"), not builder.finished
        self._put(Candidate(index, choice, 0, batch.prompt_tokens(), builder.pieces, calls=batch.calls(), cut=cut))

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
        async with self._client.call(path, body, model=self._model, tally=batch.tally) as (host, response):
            batch.host = host
            if response.content_type == "text/event-stream":
                async for chunk in events(response):
                    self._read_chunk(batch, chunk)
            else:
                self._read_whole(batch, await whole(response))

    def _body(self, batch: _Batch) -> dict[str, Any]:
        """The client's own, with what is ours: the model's name, n, seed and stream."""
        draw = self._draw
        body: dict[str, Any] = {**draw.body, "model": self._model}
        if len(batch.indices) > 1:
            body["n"] = len(batch.indices)
        if draw.seeds and draw.seeded:
            body["seed"] = draw.seeds[batch.indices[0]]
        if self._streamed:
            body["stream"] = True
            if self._model not in self._fanout.unmetered:
                body["stream_options"] = {"include_usage": True}
        return body

    def _read_whole(self, batch: _Batch, answer: Any) -> None:
        """An answer in one piece."""
        for place, choice in enumerate(_choices(answer)[: len(batch.indices)]):
            batch.builders[place] = ChoiceBuilder(self._draw.kind)
            delta = batch.builders[place].take(choice)
            if self._streamed and batch.indices[place] in self._left:
                self.stream.put(Delta(batch.indices[place], delta))
        batch.usage = _mapping(answer.get("usage"))
        batch.beside = {key: value for key, value in answer.items() if key not in OURS}

    def _read_chunk(self, batch: _Batch, chunk: Any) -> None:
        """A piece of a streamed answer; None says that this was all."""
        if chunk is None:
            batch.ended = True
            return
        _raise_if_error(chunk)
        batch.usage = _mapping(chunk.get("usage")) or batch.usage
        batch.beside |= {key: value for key, value in chunk.items() if key not in OURS}
        for choice in chunk.get("choices") or ():
            place = choice.get("index", 0) if isinstance(choice, dict) else None
            if not isinstance(place, int) or not 0 <= place < len(batch.indices):
                continue
            if place not in batch.builders:
                batch.builders[place] = ChoiceBuilder(self._draw.kind)
            piece, index = batch.builders[place].add(choice), batch.indices[place]
            if piece is not None and index in self._left:
                self.stream.put(Delta(index, piece))

    def _complete(self, batch: _Batch) -> None:
        """The call has ended well: its choices are candidates, what broke off has failed, what it left out is drawn alone."""
        if not batch.builders:
            raise UpstreamFailed("the upstream's answer holds no choices.")
        done = {place: builder.choice("stop") for place, builder in sorted(batch.builders.items()) if batch.finished(place)}
        spent = batch.usage.get("completion_tokens")
        counts = [batch.builders[place].pieces for place in done]
        weights = (
            counts if max(counts, default=0) > 1 else [weight(choice) for choice in done.values()]
        )  # a piece is a token, mostly
        tokens = shares(spent, weights) if isinstance(spent, int) and done else counts
        for (place, choice), count in zip(done.items(), tokens, strict=True):
            index, calls = batch.indices[place], batch.calls()
            self._put(Candidate(index, choice, 0, batch.prompt_tokens(), count, calls=calls, beside=batch.beside))
        for place in batch.builders.keys() - done.keys():
            why = "the upstream's stream ended before the answer did"
            self._put(Candidate(batch.indices[place], {}, error=why, status=502, calls=batch.calls()))
        left_out = [index for place, index in enumerate(batch.indices) if place not in batch.builders]
        if batch.host and (left_out or batch.then):
            self._fanout.learn(batch.host, self._model, len(batch.builders))
        for index in (*left_out, *batch.then):
            if index in self._left:
                self._begin(_Batch([index]))

    def _failed(self, batch: _Batch, error: UpstreamFailed) -> None:
        """The call has not ended well: a wrong request is wrong for all, a failure is its candidates' own."""
        if error.refused and "stream_options" in f"{error.param} {error.message}" and self._model not in self._fanout.unmetered:
            self._fanout.unmetered.add(self._model)
            self._begin(_Batch(batch.indices, batch.then, batch.tally))
            return
        if error.refused and len(batch.indices) > 1 and self._fanout.doubtful:
            # Is it the number that is refused, or the request? The first, asked alone, tells.
            first, *others = batch.indices
            self._begin(_Batch([first], others, batch.tally))
            return
        if error.refused:
            status = 400 if error.status == 422 else error.status  # 422 is what OpenAI's clients do not expect
            code = None if error.code == UpstreamFailed.code else error.code
            self.fail(InvalidRequest(error.message, param=error.param, code=code, status=status))
            return
        for place, index in enumerate((*batch.indices, *batch.then)):
            if batch.finished(place):  # of an answer that broke off, a choice that was complete is complete
                builder, calls = batch.builders[place], batch.calls()
                self._put(Candidate(index, builder.choice(), 0, 0, builder.pieces, calls=calls, beside=batch.beside))
                continue
            failed = Candidate(index, {}, error=error.message, status=error.status, retry_after=error.retry_after)
            self._put(replace(failed, calls=batch.calls()))


def _choices(answer: Any) -> list[Any]:
    _raise_if_error(answer)
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise UpstreamFailed("the upstream's answer holds no choices.")
    return sorted(choices, key=lambda choice: choice.get("index", 0) if isinstance(choice.get("index", 0), int) else 0)


def _raise_if_error(answer: Any) -> None:
    """Some servers say 200 and mean an error."""
    if not isinstance(answer, dict):
        raise UpstreamFailed(f"the upstream's answer is {str(answer)[:40]!r}, not an object.")
    if error := answer.get("error"):
        told = error.get("message") if isinstance(error, dict) else error
        raise UpstreamFailed(str(told))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
