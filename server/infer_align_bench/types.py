"""The data types of a measurement: Target, ChatPrompt, Load, Sample, Span and Run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from infer_align_bench.credentials import ApiKey


@dataclass(frozen=True, slots=True)
class Target:
    """One endpoint and the fields that every request to it carries."""

    # "A", or "B" for the second endpoint of a comparison.
    name: str
    base_url: str
    # None: the first model that the endpoint lists.
    model: str | None = None
    align: Mapping[str, Any] | None = None
    # Further fields of the body. The value None removes a field.
    body: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = True
    key: ApiKey = field(default_factory=ApiKey)

    @property
    def place(self) -> str:
        """Return the address without user name and password, for messages and files."""
        url = urlsplit(self.base_url)
        return urlunsplit(url._replace(netloc=url.netloc.rpartition("@")[2]))


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """One conversation and its own body fields, such as max_tokens."""

    messages: tuple[Mapping[str, Any], ...]
    body: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Load:
    """The load of a run.

    A closed loop keeps `concurrency` requests in flight. An open loop sends `rate` requests per
    second at random times.
    """

    concurrency: int | None = 1
    # Requests per second and target; None: a closed loop.
    rate: float | None = None
    # Requests per target; None: until `duration` is over.
    requests: int | None = 200
    # Seconds in which requests are started.
    duration: float | None = None
    # Seconds after `duration` until unfinished requests are given up and counted as failed.
    grace: float = 10.0
    # Seconds of one request.
    timeout: float = 120.0
    # Open loop, per target: requests beyond it wait in the client, and their waiting counts.
    max_in_flight: int | None = None
    seed: int = 0
    # Index of the first request.
    first: int = 0

    @property
    def open(self) -> bool:
        """Return True if requests are sent at a rate, independent of the answers."""
        return self.rate is not None


@dataclass(frozen=True, slots=True)
class Sample:
    """One request and its outcome.

    Times are seconds since the start of the run. Token counts are None if the endpoint sent none.
    """

    target: str
    # Index of the request within its target. With two targets, equal indices form a pair.
    index: int
    # Due time: latency counts from here.
    intended: float
    # Time at which the request was sent.
    started: float
    ended: float
    # Arrival of the first chunk with content.
    first: float | None = None
    # Seconds between consecutive chunks with content.
    gaps: tuple[float, ...] = ()
    chunks: int = 0
    prompt_tokens: int | None = None
    # Completion tokens that were generated.
    spent: int | None = None
    # Completion tokens that were returned.
    returned: int | None = None
    # Counts of align.usage.
    align: Mapping[str, int] = field(default_factory=dict)
    finish_reason: str | None = None
    # Kind of the error, such as "http 429"; None for an answered request.
    error: str | None = None
    # Message of the error.
    message: str = ""

    @property
    def ok(self) -> bool:
        """Return True if the request was answered."""
        return self.error is None

    @property
    def e2e(self) -> float:
        """Return the seconds from the due time to the end of the answer."""
        return self.ended - self.intended

    @property
    def ttft(self) -> float | None:
        """Return the seconds from the due time to the first token."""
        return None if self.first is None else self.first - self.intended

    @property
    def tokens(self) -> int:
        """Return the returned tokens, or chunks with content if the endpoint sent no usage."""
        return self.chunks if self.returned is None else self.returned

    @property
    def generated_tokens(self) -> int:
        """Return the generated tokens, or returned tokens if the endpoint did not count them."""
        return self.tokens if self.spent is None else self.spent

    @property
    def tpot(self) -> float | None:
        """Return the seconds per token after the first; None for an answer in one chunk."""
        if self.first is None or self.chunks < 2 or self.tokens < 2:
            return None
        return sum(self.gaps) / (self.tokens - 1)


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a run in which one target was under load, in seconds since the start."""

    target: str
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Run:
    """All samples of one run in the order in which they ended, and the spans of each target."""

    samples: tuple[Sample, ...]
    seconds: float
    spans: tuple[Span, ...] = ()
    interrupted: bool = False
    # Requests in flight at an interrupt.
    abandoned: int = 0
    # Requests that were due at an interrupt and still waited in the client.
    unsent: int = 0
