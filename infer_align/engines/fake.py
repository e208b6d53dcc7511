"""A real engine with scripted replies, delays and faults: what tests, docs and overhead benchmarks run on.

Candidate i of a draw speaks line `i mod len(replies)` of the script, a word per token. It honours stop, the token maximum, seeds
(recorded, as there is no chance in it), cancellation and streaming, so the flow above it is the same as over a model.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Le

from infer_align.decoding.params import SamplingParams, field_schemas
from infer_align.engines import Engine, Stream
from infer_align.errors import EngineFailed, InvalidRequest, Unavailable, nearest
from infer_align.messages import text_of
from infer_align.types import (
    Body,
    Candidate,
    Capability,
    Delta,
    Draw,
    Estimate,
    Kind,
    LabelLogprobs,
    LabelQuery,
)

READ = {
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "max_tokens",
    "max_completion_tokens",
    "stop",
}


@dataclass(frozen=True, slots=True)
class Reply:
    """One scripted answer. "{prompt}" in `text` stands for the last message's text, "{seed}" for the candidate's seed."""

    text: str = field(
        default="Hello from {prompt}", metadata={"description": "What it says, a word per token."}
    )
    tool_calls: tuple[dict[str, Any], ...] = field(
        default=(), metadata={"description": "OpenAI tool calls it ends with."}
    )
    error: str | None = field(
        default=None, metadata={"description": "Fail with this message after the text."}
    )
    status: int | None = field(
        default=None, metadata={"description": "The HTTP status behind the error."}
    )
    seconds_per_token: float = field(
        default=0.0, metadata={"ge": 0, "description": "Delay before each token."}
    )
    estimates: dict[str, float] = field(
        default_factory=dict,
        metadata={"description": "{value name: what it expects of this answer on its way}."},
    )
    first_token_seconds: float = field(
        default=0.0, metadata={"ge": 0, "description": "Delay before the first, as prefill is."}
    )
    spread: float = field(
        default=0.0,
        metadata={
            "ge": 0,
            "description": "A candidate's delays are 1 to 1 + spread times as long, evenly, by its seed.",
        },
    )


@dataclass(frozen=True, slots=True)
class Labels:
    """One scripted judgement: how likely labels are after prompts of some form."""

    probabilities: dict[str, Annotated[float, Ge(0), Le(1)]] = field(
        metadata={"description": "{label: probability}; others have none."}
    )
    pattern: str = field(
        default="",
        metadata={
            "description": "The prompt's text must hold this (Python's re, dots match newlines)."
        },
    )
    error: str | None = field(
        default=None, metadata={"description": "Fail with this message instead."}
    )


@dataclass(frozen=True, slots=True)
class Fake:
    """Scripted replies, delays and faults."""

    model: str = field(default="fake", metadata={"description": "Name it is served under."})
    replies: tuple[Reply, ...] = field(
        default=(Reply(),),
        metadata={"description": "The script; candidate i speaks reply i mod its length."},
    )
    labels: tuple[Labels, ...] = field(
        default=(),
        metadata={
            "description": "Judgements; the first that fits prompt and labels is given, and where none does all are as likely."
        },
    )
    context_length: int = field(
        default=4096, metadata={"ge": 1, "description": "Tokens of prompt and completion together."}
    )
    load_seconds: float = field(
        default=0.0, metadata={"ge": 0, "description": "How long loading takes."}
    )

    def load(self) -> FakeEngine:
        """The engine, not yet started."""
        return FakeEngine(self)


plugin = Fake


class FakeEngine(Engine):
    """Plays a script. `running` counts the candidates being sampled now; `bodies`, `queries` keep what it was sent, newest last."""

    model: str = ""
    context_length: int = 0
    capabilities: frozenset[Capability] = frozenset(
        {
            Capability.CHAT,
            Capability.COMPLETION,
            Capability.SEED,
            Capability.LABEL_LOGPROBS,
            Capability.TOOLS,
            Capability.STRUCTURED,
            Capability.ESTIMATES,
        }
    )

    def __init__(self, script: Fake) -> None:
        self.script = script
        self.model = script.model
        self.context_length = script.context_length
        self.running = 0
        self.sampled = 0
        self.bodies: list[Body] = []
        self.queries: list[LabelQuery] = []
        self._loaded = False
        self._closed = False
        self._tasks: dict[asyncio.Task[None], Stream] = {}

    async def start(self) -> None:
        """Wait as long as the script says."""
        await asyncio.sleep(self.script.load_seconds)
        self._loaded = True

    async def close(self) -> None:
        """Cancel what is spoken; its streams end with an error."""
        self._closed = True
        for task, stream in self._tasks.items():
            task.cancel()
            stream.put(Unavailable("the engine was shut down"))

    def health(self) -> str | None:
        """None between start and close."""
        if self._closed:
            return "the engine was shut down"
        return None if self._loaded else "the script is still loading"

    def check(self, draw: Draw) -> None:
        """Read the sampling fields; every other field is taken, as a model server with unknown extensions would."""
        _params(draw)
        for name in draw.estimates.values if draw.estimates else ():
            known = sorted({name for reply in self.script.replies for name in reply.estimates})
            if name not in known:
                where = f"align.early_stop.values.{name}"
                raise InvalidRequest(f"{where}: no such value; {nearest(name, known)}", param=where)

    def field_schemas(self, kind: Kind) -> Mapping[str, Any]:
        """Those that are read."""
        return {name: schema for name, schema in field_schemas(kind).items() if name in READ}

    def sample(self, draw: Draw) -> Stream:
        """Play the script for each candidate of the draw.

        Raises:
            Unavailable: after close.
        """
        if self._closed:
            raise Unavailable("the engine was shut down")
        self.bodies = [*self.bodies[-99:], draw.body]
        tasks: list[asyncio.Task[None]] = []
        stops = [asyncio.Event() for _ in range(draw.n)]

        def stop(index: int | None) -> None:
            for event in stops if index is None else [stops[index]]:
                event.set()

        def close() -> None:
            for task in tasks:
                task.cancel()

        stream = Stream(draw.n, stop, close)
        params = _params(draw)
        tasks += [
            asyncio.create_task(self._play(draw, params, i, stream, stops[i]))
            for i in range(draw.n)
        ]
        for task in tasks:
            self._tasks[task] = stream
            task.add_done_callback(self._tasks.pop)
        return stream

    def label_calls(self, labels: tuple[str, ...]) -> int:
        """A judgement is scripted as a whole."""
        return min(1, len(labels))

    async def read_labels(self, query: LabelQuery) -> LabelLogprobs:
        """The first scripted judgement that fits.

        Raises:
            Unavailable: after close.
            EngineFailed: the script says so.
        """
        if self._closed:
            raise Unavailable("the engine was shut down")
        self.queries = [*self.queries[-999:], query]
        text = "\n".join(text_of(message.get("content")) for message in query.messages)
        even = Labels(dict.fromkeys(query.labels, 1.0 / len(query.labels)))
        said = next((script for script in self.script.labels if _fits(script, text, query)), even)
        if said.error is not None:
            raise EngineFailed(said.error)
        found = {label: said.probabilities.get(label, 0.0) for label in query.labels}
        logprobs = {label: math.log(p) if p else -math.inf for label, p in found.items()}
        return LabelLogprobs(logprobs, len(text.split()))

    async def _play(
        self, draw: Draw, params: SamplingParams, index: int, stream: Stream, stop: asyncio.Event
    ) -> None:
        self.running += 1
        self.sampled += 1
        try:
            await self._speak(draw, params, index, stream, stop)
        except EngineFailed as error:
            stream.put(Candidate(index, {}, error=error.message, status=error.status))
        except Exception as error:
            stream.put(EngineFailed(f"the script failed: {error!r}", status=500))
            raise
        finally:
            self.running -= 1

    async def _speak(
        self, draw: Draw, params: SamplingParams, index: int, stream: Stream, stop: asyncio.Event
    ) -> None:
        reply = self.script.replies[index % len(self.script.replies)]
        prompt = _prompt(draw)
        text = reply.text.replace("{prompt}", prompt).replace("{seed}", str(draw.seeds[index]))
        for ending in params.stop:
            text = text.partition(ending)[0]
        words = text.split(" ")
        limit = min(params.max_tokens or self.context_length, self.context_length)
        spoken: list[str] = []
        async for word in _paced(
            words[:limit], reply, stop, slowness(reply.spread, draw.seeds[index])
        ):
            piece = word if not spoken else f" {word}"
            spoken.append(piece)
            stream.put(
                Delta(
                    index, {"delta": {"content": piece}} if draw.kind == "chat" else {"text": piece}
                )
            )
            if draw.estimates and draw.estimates.is_due(len(spoken)):
                expected = sum(
                    weight * reply.estimates.get(name, math.nan)
                    for name, weight in draw.estimates.values.items()
                )
                stream.put(Estimate(index, len(spoken), expected))
        if reply.error is not None and not stop.is_set():
            raise EngineFailed(reply.error, status=reply.status)
        if reply.tool_calls and not stop.is_set():
            calls = [{"index": i, **call} for i, call in enumerate(reply.tool_calls)]
            stream.put(Delta(index, {"delta": {"tool_calls": calls}}))
        reason = (
            "length"
            if stop.is_set() or len(words) > limit
            else "tool_calls"
            if reply.tool_calls
            else "stop"
        )
        choice = _choice(draw, "".join(spoken), reply, reason)
        stream.put(
            Candidate(index, choice, 0, len(prompt.split()), len(spoken), interrupted=stop.is_set())
        )


def _fits(script: Labels, text: str, query: LabelQuery) -> bool:
    asked = bool(script.error) or any(label in query.labels for label in script.probabilities)
    return asked and re.search(script.pattern, text, re.DOTALL) is not None


def _params(draw: Draw) -> SamplingParams:
    return SamplingParams.from_body(
        {key: value for key, value in draw.body.items() if key in READ}, draw.kind
    )


def slowness(spread: float, seed: int) -> float:
    """What a candidate's delays are multiplied by: uniform in [1, 1 + spread), the same for the same seed."""
    return 1.0 + spread * random.Random(seed).random()  # noqa: S311 - a delay, no secret


async def _paced(
    words: list[str], reply: Reply, stop: asyncio.Event, slow: float
) -> AsyncIterator[str]:
    delay = reply.first_token_seconds * slow
    for word in words:
        delay += reply.seconds_per_token * slow
        if delay:
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), delay)
        if stop.is_set():
            return
        yield word
        delay = 0.0


def _prompt(draw: Draw) -> str:
    if draw.kind == "completion":
        return str(draw.body.get("prompt", ""))
    return text_of(draw.body["messages"][-1].get("content"))


def _choice(draw: Draw, text: str, reply: Reply, reason: str) -> dict[str, Any]:
    if draw.kind == "completion":
        return {"text": text, "logprobs": None, "finish_reason": reason}
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if reply.tool_calls:
        message |= {"content": text or None, "tool_calls": list(reply.tool_calls)}
    return {"message": message, "logprobs": None, "finish_reason": reason}
