"""The nouns of a measurement: Target, Prompt, Load, Sample, Run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from infer_align_bench.keys import Key


@dataclass(frozen=True, slots=True)
class Target:
    """One endpoint, and what every request to it carries."""

    name: str  # "A", or "B" beside it
    base_url: str
    model: str | None = None  # None: the first that it lists
    align: Mapping[str, Any] | None = None
    body: Mapping[str, Any] = field(default_factory=dict)  # further fields; None removes one
    stream: bool = True
    key: Key = field(default_factory=Key)

    @property
    def place(self) -> str:
        """Its address for people and files: without a password that may stand in it."""
        url = urlsplit(self.base_url)
        return urlunsplit(url._replace(netloc=url.netloc.rpartition("@")[2]))


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation, and the fields that belong to it, such as max_tokens."""

    messages: tuple[Mapping[str, Any], ...]
    body: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Load:
    """How requests come: `concurrency` of them always under way (closed loop), or at random times `rate` a second (open loop)."""

    concurrency: int | None = 1
    rate: float | None = None  # per target
    requests: int | None = 200  # per target; None: until `duration`
    duration: float | None = None  # seconds in which requests are started
    grace: float = 10.0  # seconds after `duration` in which those under way may end; then they are given up, and counted
    timeout: float = 120.0  # seconds of one request
    max_in_flight: int | None = (
        None  # open loop, per target: those beyond it wait in the client, and their waiting counts
    )
    seed: int = 0
    first: int = 0  # the index of the first request

    @property
    def open(self) -> bool:
        """Whether arrivals do not wait for answers."""
        return self.rate is not None


@dataclass(frozen=True, slots=True)
class Sample:
    """One request's fate. Times are seconds since the run began; tokens are None where the endpoint does not say."""

    target: str
    index: int  # which request of its target; with two targets, the pair
    intended: float  # when it should have been sent: latency counts from here
    started: float  # when it was
    ended: float
    first: float | None = None  # the first chunk with content
    gaps: tuple[float, ...] = ()  # between chunks with content
    chunks: int = 0
    prompt_tokens: int | None = None
    spent: int | None = None  # completion tokens that were generated
    returned: int | None = None  # those of them that came back
    align: Mapping[str, int] = field(default_factory=dict)  # align.usage
    finish_reason: str | None = None
    error: str | None = None  # its kind, such as "http 429"
    message: str = ""  # what it said

    @property
    def ok(self) -> bool:
        """Whether it was answered."""
        return self.error is None

    @property
    def e2e(self) -> float:
        """Seconds to the end of the answer."""
        return self.ended - self.intended

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token."""
        return None if self.first is None else self.first - self.intended

    @property
    def tokens(self) -> int:
        """Returned tokens; chunks with content where the endpoint sends no usage."""
        return self.chunks if self.returned is None else self.returned

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None for an answer that came in one piece, whose tokens came at no rate."""
        if self.first is None or self.chunks < 2 or self.tokens < 2:
            return None
        return sum(self.gaps) / (self.tokens - 1)


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a run in which one target was under load; seconds since the run began."""

    target: str
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Run:
    """All samples of one run, in the order in which they ended, and when each target was under load."""

    samples: tuple[Sample, ...]
    seconds: float
    spans: tuple[Span, ...] = ()
    interrupted: bool = False
    abandoned: int = 0  # requests under way when it was interrupted
    unsent: int = 0  # requests that were due by then and still waited in the client
