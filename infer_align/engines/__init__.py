"""Engines turn a Draw into candidates. This file defines an engine; each file beside it is one.

An engine module holds a frozen dataclass, its `[engine]` section, whose `load()` returns the
Engine. An engine forwards every OpenAI field of a body, or refuses it by name in `check`. It never
drops one.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

from infer_align.decoding.labels import LabelLogprobs, LabelQuery
from infer_align.decoding.params import COMPLETION_TOKENS
from infer_align.decoding.sequences import SequenceLogprobs, SequenceQuery
from infer_align.errors import AlignError, Unavailable, Unsupported
from infer_align.messages import message_text
from infer_align.types import Body, Candidate, Capability, Draw, Event, Kind
from infer_align.values import Value

# Tokens that a chat template writes around one message, such as its role, at most.
TEMPLATE_TOKENS = 32
# An ASGI application: scope, receive, send.
App: TypeAlias = Callable[[Any, Any, Any], Any]


class Undiscovered(Unavailable):
    """503: the engine does not know yet if it can honour a request.

    Whoever plans the request awaits `discover()` and plans again.

    Attributes:
        discover: finds out what is unknown, with calls that cost a few tokens.
    """

    def __init__(self, message: str, discover: Callable[[], Awaitable[None]]) -> None:
        super().__init__(message, retry_after=1)
        self.discover = discover


class Engine(ABC):
    """A frozen model that can be sampled.

    Attributes:
        values: the value estimators by name. Set before `start`, which loads them.
        served_name: the name of the model in the API, if it differs from the engine's name for it.
            Set before `start`.
        default_max_tokens: the server's limit for requests that name none. The server writes it
            into their bodies; an engine that counts the prompt's tokens shortens it to what fits.
        progress: called with a short text about what is being loaded, from any thread. Set before
            `start`.
        reads_values: True if `sequence_logprobs` also reads what values expect after the texts.
    """

    values: Mapping[str, Value] = MappingProxyType({})
    served_name: str | None = None
    default_max_tokens: int | None = None
    progress: Callable[[str], None] = staticmethod(lambda _: None)
    reads_values: ClassVar[bool] = False

    @property
    @abstractmethod
    def model(self) -> str:
        """Return the name under which the model is served."""

    @property
    @abstractmethod
    def capabilities(self) -> frozenset[Capability]:
        """Return the capabilities of the engine with this model."""

    @property
    @abstractmethod
    def context_length(self) -> int:
        """Return the maximum number of tokens of prompt and completion together.

        It is also the worst case of a request that sets no maximum.
        """

    @property
    def unknown_capabilities(self) -> frozenset[Capability]:
        """Return the capabilities that are found out only when a request needs them."""
        return frozenset()

    def missing(self, needs: frozenset[Capability], model: object = None) -> frozenset[Capability]:
        """Return the needed capabilities that the engine lacks.

        Args:
            needs: the needed capabilities.
            model: the model of the request; the first one if it is not a name of a model.

        Raises:
            Undiscovered: a needed capability was not looked for yet.
            Unavailable: a needed capability could not be found out.
        """
        return needs - self.capabilities

    def describe(self, model: object = None) -> str:
        """Return how messages name the engine with a model; see `missing`."""
        name = self.model
        return f"the engine of {name!r}" if name else f"the engine {type(self).__name__}"

    @property
    def capability_hints(self) -> Mapping[Capability, str]:
        """Return a clause on how to enable it, for each missing capability that can be enabled."""
        return {}

    @property
    def notes(self) -> tuple[str, ...]:
        """Return sentences on what the model lacks and what to do. Final after `start`."""
        return ()

    @property
    def models(self) -> tuple[str, ...]:
        """Return the names of all its models, `model` first. Final once the engine has started."""
        return (self.model,)

    async def start(self) -> None:
        """Load models and open connections. Called once, before every other method."""

    async def close(self) -> None:
        """Stop everything that runs and free all resources."""

    async def add_value(self, name: str, value: Value) -> None:
        """Make another value available to draws from now on, without a restart.

        A value of the same name is replaced; draws that already use it keep it.

        Raises:
            Unsupported: the engine holds no values of its own.
            ConfigError: the value does not fit the model.
        """
        raise Unsupported(
            f"{self.describe()} holds no values, so {name!r} ({value.description}) "
            "cannot be added; use an engine of kind transformers or vllm."
        )

    @abstractmethod
    def health(self) -> str | None:
        """Return None if the engine can answer, else the reason why it cannot."""

    @abstractmethod
    def check(self, draw: Draw) -> None:
        """Refuse a draw that this engine cannot honour, before anything is spent.

        Raises:
            InvalidRequest: names the field, its value and what is allowed.
        """

    def is_prepared(self, body: Body, kind: Kind) -> bool:
        """Return True if `check` of a body waits for nothing, so `prepare` has nothing to do."""
        return True

    async def prepare(self, body: Body, kind: Kind) -> None:
        """Do beside other requests what `check` of a body would wait for.

        It raises nothing; what is wrong with the body is an error of `check`.
        """

    def field_schemas(self, kind: Kind) -> Mapping[str, Any]:
        """Return the JSON schemas of the sampling fields that `check` reads, by field.

        Fields that are forwarded unread have none.
        """
        return {}

    @abstractmethod
    def sample(self, draw: Draw) -> Stream:
        """Start sampling a draw.

        Call it in a running event loop, and close the stream.
        """

    def exposition(self) -> bytes:
        """Return the engine's own metrics in Prometheus's format."""
        return b""

    @property
    def control_tokens(self) -> frozenset[str]:
        """Return the special tokens of the tokenizer, if known. Judge prompts escape them."""
        return frozenset()

    @property
    def has_system_role(self) -> bool:
        """Return True unless the model is known to see no system messages.

        Judge prompts then have their instruction in the user's turn.
        """
        return True

    @property
    def reads_chats(self) -> bool:
        """Return True unless the model is known to have no chat template.

        Judges and some other rewards ask in a chat.
        """
        return True

    def label_calls(self, labels: tuple[str, ...]) -> int:
        """Return an upper bound on the one-token calls that `read_labels` makes.

        It is one call, plus one per proper prefix of a label.

        Raises:
            Unsupported: the model's tokenizer cannot spell a label.
        """
        prefixes: set[str] = set()
        for label in labels:
            prefixes |= {label[:end] for end in range(1, len(label))}
        return 1 + len(prefixes)

    async def read_labels(self, query: LabelQuery) -> LabelLogprobs:
        """Read the probability of each label as the next words. Concurrent calls are batched.

        Raises:
            Unsupported: the engine lacks `Capability.LABEL_LOGPROBS`.
            AlignError: the engine failed.
        """
        raise Unsupported(
            f"{self.describe()} does not report the probabilities of labels "
            f"({len(query.labels)} requested); use an engine that does."
        )

    async def sequence_logprobs(self, query: SequenceQuery) -> SequenceLogprobs:
        """Return the log-probability of each text as the answer to a prompt.

        The prompt is read once for all texts. Concurrent calls are batched.

        Raises:
            Unsupported: the engine lacks `Capability.SEQUENCE_LOGPROBS`.
            InvalidRequest: the prompt cannot be rendered, or a text does not fit the context.
            AlignError: the engine failed.
        """
        raise Unsupported(
            f"{self.describe()} does not report the log-probabilities of given texts "
            f"({len(query.texts)} requested); use an engine that does."
        )

    async def generate(self, draw: Draw) -> list[Candidate]:
        """Return all candidates of a draw when the last one is finished, failed ones included."""
        async with self.sample(draw) as stream:
            finished = [event async for event in stream if isinstance(event, Candidate)]
        return sorted(finished, key=lambda candidate: candidate.index)

    def text_of_tokens(self, tokens: Sequence[int]) -> str:
        """Return the text of a prompt of token ids, which rewards read.

        Raises:
            Unsupported: the engine does not have the model's tokenizer.
            InvalidRequest: the model does not have one of the token ids.
        """
        raise Unsupported(
            f"prompt: {self.describe()} cannot turn {len(tokens)} token ids into text, which "
            "`align` needs; send the prompt as text.",
            param="prompt",
        )

    def prompt_tokens(self, draw: Draw) -> int:
        """Return the number of tokens of a draw's prompt, or an upper bound.

        Without a tokenizer in this process it is the number of bytes: no tokenizer writes more
        tokens.

        Raises:
            InvalidRequest: the prompt cannot be rendered.
        """
        prompt = draw.body.get("prompt")
        if draw.kind == "completion" and not isinstance(prompt, str):
            return len(prompt) if isinstance(prompt, list) else 0
        if draw.kind == "completion":
            return len(str(prompt).encode("utf-8", "surrogatepass"))
        messages = draw.body.get("messages", ())
        texts = [message_text(message) for message in messages]
        written = "".join(texts).encode("utf-8", "surrogatepass")
        return len(written) + TEMPLATE_TOKENS * (len(texts) + 1)

    def context_prompts(self, draw: Draw) -> tuple[int, ...]:
        """Return the number of tokens of each prompt that guidance reads beside the request's own.

        Equal prompts are read once.

        Raises:
            InvalidRequest: a prompt cannot be rendered.
        """
        bodies = [draw.body]
        for contrast in draw.guidance.contrasts if draw.guidance else ():
            for body in (contrast.body, contrast.negative_body):
                if body is not None and body not in bodies:
                    bodies.append(body)
        return tuple(self.prompt_tokens(replace(draw, body=body)) for body in bodies[1:])

    def worst_case_tokens(self, body: Body) -> int:
        """Return the most tokens that one candidate of this body can generate."""
        for name in ("max_completion_tokens", "max_tokens"):
            limit = body.get(name)
            # `check` refuses every other value.
            if isinstance(limit, int) and limit > 0:
                return limit
        if "messages" in body:
            return self.context_length
        return min(COMPLETION_TOKENS, self.context_length)


class Stream:
    """The events of one draw: deltas, estimates, and each of its n candidates once, finished.

    Use it as `async with engine.sample(draw) as stream`. Leaving the block cancels what still runs.
    """

    def __init__(
        self, n: int, stop: Callable[[int | None], None], close: Callable[[], None]
    ) -> None:
        """Wait for n candidates; `stop` finishes one (None: all), `close` cancels the draw."""
        self._unfinished = n
        self._stop = stop
        self._close = close
        self._events: asyncio.Queue[Event | AlignError] = asyncio.Queue()

    def put(self, event: Event | AlignError) -> None:
        """Add the next event, or the error that ends the draw.

        Only the engine calls it, and only in the event loop's thread.
        """
        self._events.put_nowait(event)

    def stop(self, index: int | None = None) -> None:
        """Finish candidate `index` (None: all) now, with the text that it has.

        The candidate is still yielded, marked as interrupted.
        """
        self._stop(index)

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if not self._unfinished:
            raise StopAsyncIteration
        event = await self._events.get()
        if isinstance(event, AlignError):
            raise event
        if isinstance(event, Candidate):
            self._unfinished -= 1
        return event
