"""Engines turn a Draw into candidates. This page is what an engine is; each file beside it is one.

An engine module holds a frozen dataclass, its `[engine]` section, whose `load()` gives the Engine. It forwards every OpenAI
field it is given or refuses it by name in `check`; it never drops one.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from infer_align.decoding.params import COMPLETION_TOKENS
from infer_align.errors import AlignError, Unsupported
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
from infer_align.values import Value

Event = Delta | Estimate | Candidate
App: TypeAlias = Callable[[Any, Any, Any], Any]  # ASGI: scope, receive, send


class Engine(ABC):
    """A frozen model that can be sampled.

    Attributes:
        values: what it can be steered by, by name; given before `start`, which loads them.
        served_name: what clients call the model, where that is not its own name; given before `start`.
        progress: told what is being loaded, in a few words, from any thread.
    """

    values: Mapping[str, Value] = MappingProxyType({})
    served_name: str | None = None
    progress: Callable[[str], None] = staticmethod(lambda _: None)

    @property
    @abstractmethod
    def model(self) -> str:
        """The name under which the model is served."""

    @property
    @abstractmethod
    def capabilities(self) -> frozenset[Capability]:
        """The capabilities of the engine with this model."""

    @property
    @abstractmethod
    def context_length(self) -> int:
        """Maximum number of tokens of prompt and completion together.

        It is also the worst case of a request that sets no maximum.
        """

    @property
    def capability_hints(self) -> Mapping[Capability, str]:
        """For each missing capability that can be enabled, a sentence on how to do it."""
        return {}

    @property
    def models(self) -> tuple[str, ...]:
        """The names it answers to, `model` first; several where it has several models. Final once it has started."""
        return (self.model,)

    async def start(self) -> None:
        """Load whatever takes time. Called once, before anything else."""

    async def close(self) -> None:
        """Stop everything that runs and free what is held."""

    async def add_value(self, name: str, value: Value) -> None:
        """Let draws use another value from now on, without a restart; one of the same name is replaced, and kept by who uses it.

        Raises:
            Unsupported: this engine holds no values of its own.
            ConfigError: it does not fit the model.
        """
        raise Unsupported(
            f"the engine of {self.model!r} holds no values: {name!r} ({value.description}) cannot be added."
        )

    @abstractmethod
    def health(self) -> str | None:
        """None while it can answer, else why it cannot."""

    @abstractmethod
    def check(self, draw: Draw) -> None:
        """Refuse, before anything is spent, what this engine cannot honour.

        Raises:
            InvalidRequest: naming the field, its value and what is allowed.
        """

    def field_schemas(self, kind: Kind) -> Mapping[str, Any]:
        """JSON schemas of the body's sampling fields that `check` reads, by name; what it forwards unread has none."""
        return {}

    @abstractmethod
    def sample(self, draw: Draw) -> Stream:
        """Start sampling; must be called from a running event loop, and the stream closed."""

    def exposition(self) -> bytes:
        """What the engine itself counts, in Prometheus's format."""
        return b""

    @property
    def control_tokens(self) -> frozenset[str]:
        """What its tokenizer reads as more than text, as far as it is known: a judge breaks it up in what it is shown."""
        return frozenset()

    def label_calls(self, labels: tuple[str, ...]) -> int:
        """How many calls of one token `read_labels` makes at most: one, and one after each beginning of a label.

        Raises:
            Unsupported: a label cannot be spelt by the model's tokenizer.
        """
        return 1 + len({label[:end] for label in labels for end in range(1, len(label))})

    async def read_labels(self, query: LabelQuery) -> LabelLogprobs:
        """How likely each label is to come next, one reading; many may run at once, and the engine batches them.

        Raises:
            Unsupported: the engine lacks `Capability.LABEL_LOGPROBS`.
            AlignError: it failed.
        """
        raise Unsupported(
            f"the engine of {self.model!r} shows no probabilities of labels ({len(query.labels)} asked for)."
        )

    async def generate(self, draw: Draw) -> list[Candidate]:
        """All candidates of a draw, when the last is finished; failures are among them, as `Candidate.error`."""
        async with self.sample(draw) as stream:
            finished = [event async for event in stream if isinstance(event, Candidate)]
        return sorted(finished, key=lambda candidate: candidate.index)

    def worst_case_tokens(self, body: Body) -> int:
        """The most tokens one candidate of this body can generate."""
        for name in ("max_completion_tokens", "max_tokens"):
            if (
                isinstance(limit := body.get(name), int) and limit > 0
            ):  # anything else is for `check` to refuse
                return limit
        return (
            self.context_length
            if "messages" in body
            else min(COMPLETION_TOKENS, self.context_length)
        )


class Stream:
    """What one draw yields: deltas as they are sampled, estimates where it is watched, and each of its n candidates once, finished.

    Use it as `async with engine.sample(draw) as stream`: leaving the block, however it is left, cancels what still runs.
    """

    def __init__(
        self, n: int, stop: Callable[[int | None], None], close: Callable[[], None]
    ) -> None:
        self._unfinished = n
        self._stop = stop
        self._close = close
        self._events: asyncio.Queue[Event | AlignError] = asyncio.Queue()

    def put(self, event: Event | AlignError) -> None:
        """For the engine: the next event, or the error that ends the draw. From the event loop's thread only."""
        self._events.put_nowait(event)

    def stop(self, index: int | None = None) -> None:
        """Finish candidate `index` (None: all) now, with what it has; it is still yielded, marked `cut`."""
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
