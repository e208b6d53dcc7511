"""Engines turn a Draw into candidates. This page is what an engine is; each file beside it is one.

An engine module holds a frozen dataclass, its `[engine]` section, whose `load()` gives the Engine. It forwards every OpenAI
field it is given or refuses it by name in `check`; it never drops one.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
from types import MappingProxyType
from typing import ClassVar

from infer_align.errors import AlignError
from infer_align.types import Body, Candidate, Capability, Delta, Draw
from infer_align.values import Value

Event = Delta | Candidate

# OpenAI's maximum for a text completion that sets none.
COMPLETION_TOKENS = 16


class Engine(ABC):
    """A frozen model that can be sampled.

    Attributes:
        model: the name it is served under.
        capabilities: what it can do.
        context_length: tokens of prompt and completion together; also the worst case of a request that sets no maximum.
        values: what it can be steered by, by name; given before `start`, which loads them.
    """

    model: str
    capabilities: ClassVar[frozenset[Capability]]
    context_length: int
    values: Mapping[str, Value] = MappingProxyType({})

    async def start(self) -> None:
        """Load whatever takes time. Called once, before anything else."""

    async def close(self) -> None:
        """Stop everything that runs and free what is held."""

    @abstractmethod
    def health(self) -> str | None:
        """None while it can answer, else why it cannot."""

    @abstractmethod
    def check(self, draw: Draw) -> None:
        """Refuse, before anything is spent, what this engine cannot honour.

        Raises:
            InvalidRequest: naming the field, its value and what is allowed.
        """

    @abstractmethod
    def sample(self, draw: Draw) -> Stream:
        """Start sampling; must be called from a running event loop, and the stream closed."""

    def worst_case_tokens(self, body: Body) -> int:
        """The most tokens one candidate of this body can generate."""
        for name in ("max_completion_tokens", "max_tokens"):
            if isinstance(limit := body.get(name), int) and limit > 0:  # anything else is for `check` to refuse
                return limit
        return self.context_length if "messages" in body else min(COMPLETION_TOKENS, self.context_length)


class Stream:
    """What one draw yields: deltas as they are sampled, and each of its n candidates once, when it is finished.

    Use it as `async with engine.sample(draw) as stream`: leaving the block, however it is left, cancels what still runs.
    """

    def __init__(self, n: int, stop: Callable[[int | None], None], close: Callable[[], None]) -> None:
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
