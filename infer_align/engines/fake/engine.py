"""The engine that plays a script."""

from __future__ import annotations

import asyncio
import math
import random
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from infer_align.decoding.labels import LabelLogprobs, LabelQuery, bare_label
from infer_align.decoding.params import SamplingParams, field_schemas
from infer_align.decoding.sequences import SequenceLogprobs, SequenceQuery, check_fit
from infer_align.engines import Engine, Stream
from infer_align.engines.fake.script import Reply, ScriptedLabels, ScriptedWords
from infer_align.errors import EngineFailed, InvalidRequest, Unavailable, nearest
from infer_align.messages import text_of
from infer_align.types import Array, Body, Candidate, Capability, Delta, Draw, Estimate, Kind

if TYPE_CHECKING:
    from infer_align.engines.fake import Fake

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


class FakeEngine(Engine):
    """Plays a script.

    Attributes:
        running: number of candidates that are being sampled now.
        sampled: number of candidates that were ever started.
        bodies: the bodies of the latest draws, newest last.
        queries: the latest label queries, newest last.
        sequence_queries: the latest queries for log-probabilities of texts, newest last.
    """

    model: str = ""
    context_length: int = 0
    reads_values = True
    capabilities: frozenset[Capability] = frozenset(
        {
            Capability.CHAT,
            Capability.COMPLETION,
            Capability.SEED,
            Capability.LABEL_LOGPROBS,
            Capability.TOOLS,
            Capability.STRUCTURED,
            Capability.ESTIMATES,
            Capability.SEQUENCE_LOGPROBS,
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
        self.sequence_queries: list[SequenceQuery] = []
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
        for name in draw.estimates.values:
            self._check_value(f"align.early_stop.values.{name}", name)

    def _check_value(self, param: str, name: str) -> None:
        values: set[str] = set()
        for reply in self.script.replies:
            values |= reply.estimates.keys()
        if name not in values:
            raise InvalidRequest(f"{param}: no such value; {nearest(name, values)}", param=param)

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

    def text_of_tokens(self, tokens: Sequence[int]) -> str:
        """Return each token id as a word."""
        return _prompt_text(list(tokens))

    def prompt_tokens(self, draw: Draw) -> int:
        """Return the number of words of the conversation."""
        return len(_conversation(draw.body, draw.kind).split())

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
        text = _conversation({"messages": query.messages}, "chat")
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

    async def sequence_logprobs(self, query: SequenceQuery) -> SequenceLogprobs:
        """Return the scripted log-probability of each word of each text.

        A value's estimate is that of the first reply that begins with the text, else NaN.

        Raises:
            InvalidRequest: no reply has an estimate of a value, or a text does not fit the context.
            Unavailable: the engine is closed.
            EngineFailed: the script holds an error.
        """
        if self._closed:
            raise Unavailable("the engine was shut down")
        for name in query.values:
            self._check_value(f"values.{name}", name)
        self.sequence_queries = [*self.sequence_queries, query][-_MAX_QUERIES:]
        prompt = _conversation(query.body, query.kind)
        script = self._find_words(prompt)
        if script.error is not None:
            raise EngineFailed(script.error)
        prompt_tokens = len(prompt.split())
        logprobs: list[Array] = []
        for index, text in enumerate(query.texts):
            words = text.split()
            check_fit(index, prompt_tokens, len(words), self.context_length)
            logprobs.append(np.array([script.logprobs.get(word, script.other) for word in words]))
        last = _last_text(query.body, query.kind)
        estimates: dict[str, Array] = {}
        for name in query.values:
            expected = [self._estimate(name, text, last) for text in query.texts]
            estimates[name] = np.array(expected, dtype=np.float64)
        text_tokens = sum(len(each) for each in logprobs)
        return SequenceLogprobs(tuple(logprobs), prompt_tokens, text_tokens, estimates)

    def _find_words(self, prompt: str) -> ScriptedWords:
        for script in self.script.words:
            if re.search(script.pattern, prompt, re.DOTALL) is not None:
                return script
        return ScriptedWords()

    def _estimate(self, name: str, text: str, prompt: str) -> float:
        for reply in self.script.replies:
            if reply.text.replace("{prompt}", prompt).startswith(text):
                return reply.estimates.get(name, math.nan)
        return math.nan

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
        reply = self.script.replies[(draw.first + index) % len(self.script.replies)]
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
    return _last_text(draw.body, draw.kind)


def _last_text(body: Body, kind: Kind) -> str:
    """Return the prompt of a text completion, or the last message of a chat."""
    if kind == "completion":
        return _prompt_text(body.get("prompt", ""))
    return text_of(body["messages"][-1].get("content"))


def _conversation(body: Body, kind: Kind) -> str:
    """Return the prompt of a text completion, or all messages of a chat."""
    if kind == "completion":
        return _prompt_text(body.get("prompt", ""))
    return "\n".join(text_of(message.get("content")) for message in body["messages"])


def _prompt_text(prompt: object) -> str:
    """Return a prompt as text. Token ids become words: this engine has no vocabulary."""
    if isinstance(prompt, list):
        return " ".join(str(token) for token in prompt)
    return str(prompt)


def _choice(draw: Draw, text: str, reply: Reply, reason: str) -> dict[str, Any]:
    if draw.kind == "completion":
        return {"text": text, "logprobs": None, "finish_reason": reason}
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if reply.tool_calls:
        message |= {"content": text or None, "tool_calls": list(reply.tool_calls)}
    return {"message": message, "logprobs": None, "finish_reason": reason}
