"""A real engine that plays a script: replies, delays and faults, for tests, docs and benchmarks.

Candidate i of a draw plays reply `i mod len(replies)`, one word per token. The engine honours stop
texts, token limits, cancellation and streaming, so the flow above it is the same as over a model.
It records seeds, but nothing in it is random.
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

from infer_align.decoding.labels import LabelLogprobs, LabelQuery, bare_label
from infer_align.decoding.params import SamplingParams, field_schemas
from infer_align.engines import Engine, Stream
from infer_align.errors import EngineFailed, InvalidRequest, Unavailable, nearest
from infer_align.messages import text_of
from infer_align.types import Body, Candidate, Capability, Delta, Draw, Estimate, Kind

# The sampling fields that this engine checks.
SAMPLING_FIELDS = {
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
# Bodies and label queries that the engine remembers, for tests.
_MAX_BODIES = 100
_MAX_QUERIES = 1000


@dataclass(frozen=True, slots=True)
class Reply:
    """One scripted answer.

    In `text`, "{prompt}" stands for the text of the last message, and "{seed}" for the seed of the
    candidate.
    """

    text: str = field(
        default="Hello from {prompt}",
        metadata={"description": "Text of the answer, one word per token."},
    )
    tool_calls: tuple[dict[str, Any], ...] = field(
        default=(), metadata={"description": "OpenAI tool calls at the end of the answer."}
    )
    error: str | None = field(
        default=None, metadata={"description": "Message of a failure after the text."}
    )
    status: int | None = field(
        default=None, metadata={"description": "HTTP status of the failure."}
    )
    seconds_per_token: float = field(
        default=0.0, metadata={"ge": 0, "description": "Delay before each token in seconds."}
    )
    estimates: dict[str, float] = field(
        default_factory=dict,
        metadata={"description": "{value name: estimate of this answer while it runs}."},
    )
    first_token_seconds: float = field(
        default=0.0,
        metadata={
            "ge": 0,
            "description": "Additional delay before the first token in seconds, "
            "to imitate a prefill.",
        },
    )
    spread: float = field(
        default=0.0,
        metadata={
            "ge": 0,
            "description": "Relative spread of the delays: each candidate's delays are multiplied "
            "by a factor from 1 to 1 + spread, by its seed.",
        },
    )


@dataclass(frozen=True, slots=True)
class ScriptedLabels:
    """One scripted judgement: the label probabilities after prompts that match a pattern."""

    probabilities: dict[str, Annotated[float, Ge(0), Le(1)]] = field(
        metadata={"description": "{label: probability}; other labels have probability 0."}
    )
    pattern: str = field(
        default="",
        metadata={
            "description": "Regular expression that the prompt's text must match somewhere; a dot "
            "matches line breaks."
        },
    )
    error: str | None = field(
        default=None, metadata={"description": "Message of a failure instead of a judgement."}
    )


@dataclass(frozen=True, slots=True)
class Fake:
    """Scripted replies, delays and faults."""

    model: str = field(default="fake", metadata={"description": "Name of the model."})
    replies: tuple[Reply, ...] = field(
        default=(Reply(),),
        metadata={
            "description": "The script; candidate i returns reply i modulo the number of replies."
        },
    )
    labels: tuple[ScriptedLabels, ...] = field(
        default=(),
        metadata={
            "description": "Scripted judgements; the first one that fits the prompt and the labels "
            "is used, or equal probabilities if none fits."
        },
    )
    context_length: int = field(
        default=4096,
        metadata={"ge": 1, "description": "Maximum tokens of prompt and completion together."},
    )
    load_seconds: float = field(
        default=0.0, metadata={"ge": 0, "description": "Duration of loading in seconds."}
    )

    def load(self) -> FakeEngine:
        """Return the engine, not yet started."""
        return FakeEngine(self)


plugin = Fake


class FakeEngine(Engine):
    """Plays a script.

    Attributes:
        running: number of candidates that are being sampled now.
        sampled: number of candidates that were ever started.
        bodies: the bodies of the latest draws, newest last.
        queries: the latest label queries, newest last.
    """

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
        """Cancel every running candidate; their streams end with an error."""
        self._closed = True
        for task, stream in self._tasks.items():
            task.cancel()
            stream.put(Unavailable("the engine was shut down"))

    def health(self) -> str | None:
        """Return None between start and close, else the reason."""
        if self._closed:
            return "the engine was shut down"
        return None if self._loaded else "the script is still loading"

    def check(self, draw: Draw) -> None:
        """Check the sampling fields and the names of values.

        Every other field is accepted, as by a model server with unknown extensions.

        Raises:
            InvalidRequest: a field is wrong, or no reply has an estimate of a value.
        """
        _params(draw)
        if draw.estimates is None:
            return
        values: set[str] = set()
        for reply in self.script.replies:
            values |= reply.estimates.keys()
        for name in draw.estimates.values:
            if name not in values:
                param = f"align.early_stop.values.{name}"
                raise InvalidRequest(
                    f"{param}: no such value; {nearest(name, values)}", param=param
                )

    def field_schemas(self, kind: Kind) -> Mapping[str, Any]:
        """Return the schemas of the fields that `check` reads."""
        schemas = field_schemas(kind)
        return {name: schemas[name] for name in schemas if name in SAMPLING_FIELDS}

    def sample(self, draw: Draw) -> Stream:
        """Play the script for each candidate of the draw.

        Raises:
            Unavailable: the engine is closed.
        """
        if self._closed:
            raise Unavailable("the engine was shut down")
        self.bodies = [*self.bodies, draw.body][-_MAX_BODIES:]
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
        for i in range(draw.n):
            task = asyncio.create_task(self._run(draw, params, i, stream, stops[i]))
            tasks.append(task)
            self._tasks[task] = stream
            task.add_done_callback(self._tasks.pop)
        return stream

    def label_calls(self, labels: tuple[str, ...]) -> int:
        """Return 1: a judgement is scripted as a whole."""
        return min(1, len(labels))

    async def read_labels(self, query: LabelQuery) -> LabelLogprobs:
        """Return the first scripted judgement that fits.

        Raises:
            Unavailable: the engine is closed.
            EngineFailed: the script holds an error.
        """
        if self._closed:
            raise Unavailable("the engine was shut down")
        self.queries = [*self.queries, query][-_MAX_QUERIES:]
        text = "\n".join(text_of(message.get("content")) for message in query.messages)
        judgement = self._find_labels(text, query)
        if judgement.error is not None:
            raise EngineFailed(judgement.error)
        scripted: dict[str, float] = {}
        for label, probability in judgement.probabilities.items():
            bare = bare_label(label)
            scripted[bare] = scripted.get(bare, 0.0) + probability
        logprobs = {}
        for label in query.labels:
            probability = scripted.get(label, 0.0)
            logprobs[label] = math.log(probability) if probability else -math.inf
        return LabelLogprobs(logprobs, len(text.split()))

    def _find_labels(self, text: str, query: LabelQuery) -> ScriptedLabels:
        for judgement in self.script.labels:
            is_about = any(bare_label(label) in query.labels for label in judgement.probabilities)
            if not is_about and not judgement.error:
                continue
            if re.search(judgement.pattern, text, re.DOTALL) is not None:
                return judgement
        return ScriptedLabels(dict.fromkeys(query.labels, 1.0 / len(query.labels)))

    async def _run(
        self, draw: Draw, params: SamplingParams, index: int, stream: Stream, stop: asyncio.Event
    ) -> None:
        self.running += 1
        self.sampled += 1
        try:
            await self._play(draw, params, index, stream, stop)
        except EngineFailed as error:
            stream.put(Candidate(index, {}, error=error.message, status=error.status))
        except Exception as error:
            stream.put(EngineFailed(f"the script failed: {error!r}", status=500))
            raise
        finally:
            self.running -= 1

    async def _play(
        self, draw: Draw, params: SamplingParams, index: int, stream: Stream, stop: asyncio.Event
    ) -> None:
        """Play one reply into the stream, up to its end, the token limit or the stop event."""
        reply = self.script.replies[index % len(self.script.replies)]
        seed = draw.seeds[index]
        prompt = _prompt(draw)
        words = _words(reply, prompt, seed, params)
        limit = min(params.max_tokens or self.context_length, self.context_length)
        text = ""
        tokens = 0
        async for word in _paced(words[:limit], reply, stop, delay_factor(reply.spread, seed)):
            piece = f" {word}" if tokens else word
            text += piece
            tokens += 1
            stream.put(Delta(index, _delta(draw, piece)))
            if draw.estimates and draw.estimates.is_due(tokens):
                stream.put(Estimate(index, tokens, _expected(reply, draw.estimates.values)))
        interrupted = stop.is_set()
        if reply.error is not None and not interrupted:
            raise EngineFailed(reply.error, status=reply.status)
        if reply.tool_calls and not interrupted:
            calls = [{"index": i, **call} for i, call in enumerate(reply.tool_calls)]
            stream.put(Delta(index, {"delta": {"tool_calls": calls}}))
        reason = "tool_calls" if reply.tool_calls else "stop"
        if interrupted or len(words) > limit:
            reason = "length"
        choice = _choice(draw, text, reply, reason)
        prompt_tokens = len(prompt.split())
        stream.put(Candidate(index, choice, 0, prompt_tokens, tokens, interrupted=interrupted))


def _params(draw: Draw) -> SamplingParams:
    fields = {key: value for key, value in draw.body.items() if key in SAMPLING_FIELDS}
    return SamplingParams.from_body(fields, draw.kind)


def _words(reply: Reply, prompt: str, seed: int, params: SamplingParams) -> list[str]:
    text = reply.text.replace("{prompt}", prompt).replace("{seed}", str(seed))
    for ending in params.stop:
        text = text.partition(ending)[0]
    return text.split(" ")


def _expected(reply: Reply, weights: Mapping[str, float]) -> float:
    """Return the weighted sum of the reply's estimates; NaN if one of them is not scripted."""
    terms = [weight * reply.estimates.get(name, math.nan) for name, weight in weights.items()]
    return sum(terms)


def delay_factor(spread: float, seed: int) -> float:
    """Return the factor of a candidate's delays: uniform in [1, 1 + spread), by its seed."""
    return 1.0 + spread * random.Random(seed).random()  # noqa: S311 - a delay, no secret


async def _paced(
    words: list[str], reply: Reply, stop: asyncio.Event, factor: float
) -> AsyncIterator[str]:
    """Yield the words with the reply's delays, until `stop` is set."""
    delay = reply.first_token_seconds * factor
    for word in words:
        delay += reply.seconds_per_token * factor
        if delay:
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), delay)
        if stop.is_set():
            return
        yield word
        delay = 0.0


def _delta(draw: Draw, piece: str) -> dict[str, Any]:
    if draw.kind == "chat":
        return {"delta": {"content": piece}}
    return {"text": piece}


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
