"""A draw on its way, and each of its candidates: its tokens, its text, and what it has told its stream."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from infer_align.decoding.cache import RowCache
from infer_align.decoding.params import SamplingParams
from infer_align.decoding.text import TextStream, token_bytes
from infer_align.engines import Event, Stream
from infer_align.engines.transformers.model import Model, Prompt, Step
from infer_align.types import Candidate, Delta, Draw
from infer_align.values import Value
from infer_align.values.head import HeadValue
from infer_align.values.lookahead import ValueLM


@dataclass(eq=False)
class Job:
    """One draw on its way: waiting, prefilled, then as rows in the batch."""

    draw: Draw
    params: SamplingParams
    prompt: Prompt
    room: int  # tokens that each candidate may generate
    # Loaded values and their weights. A value may be replaced later; the job keeps the one it was bound to.
    steering: Mapping[Value, float] = field(default_factory=dict)
    estimates: Mapping[HeadValue, float] = field(default_factory=dict)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    stream: Stream = field(init=False)
    closed: bool = False  # set from the event loop: nobody listens any more
    rows: deque[Row] = field(
        default_factory=deque
    )  # the candidates that have not joined the batch; filled by the scheduler
    cache: RowCache = field(default_factory=RowCache)  # the prompt's one row, filled by prefill
    step: Step | None = None  # after the prompt, of one row; None until it is prefilled
    value_caches: dict[ValueLM, RowCache] = field(
        default_factory=dict
    )  # the prompt's row in the value LMs that steer the draw
    stops: set[int | None] = field(default_factory=set)  # candidates to finish now; None means all
    unfinished: int = field(
        init=False
    )  # candidates still to be told; counted down by the scheduler

    def __post_init__(self) -> None:
        self.unfinished = self.draw.n
        self.stream = Stream(self.draw.n, self.stops.add, self._close)

    def _close(self) -> None:
        self.closed = True

    @property
    def echo(self) -> str:
        """What a text completion repeats before its own words."""
        return self.prompt.text if self.params.echo else ""

    @property
    def width(self) -> int:
        """Columns of the cache that each candidate may come to need."""
        return len(self.prompt.ids) + self.room

    def stopping(self, row: Row) -> bool:
        """Whether the candidate is to be finished now."""
        return None in self.stops or row.index in self.stops


@dataclass(slots=True, eq=False)
class Row:
    """Candidate `index` of a job; one row of the running batch while it is decoded."""

    job: Job
    index: int
    seed: int
    text: TextStream
    eos: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)  # one per token, when asked for
    pending: list[dict[str, Any]] = field(
        default_factory=list
    )  # of those, the ones not yet streamed
    finish_reason: str | None = None
    unsaid: str = field(init=False)  # the echo, until the first delta

    def __post_init__(self) -> None:
        self.unsaid = self.job.echo

    @property
    def params(self) -> SamplingParams:
        """The job's sampling parameters."""
        return self.job.params

    @property
    def prompt_ids(self) -> list[int]:
        """The job's prompt."""
        return self.job.prompt.ids

    @property
    def length(self) -> int:
        """Tokens whose keys and values are needed for the next step: all of them."""
        return len(self.prompt_ids) + len(self.tokens)

    @property
    def is_due(self) -> bool:
        """Whether somebody wants to hear now what it is expected to be worth."""
        watch = self.job.draw.estimates
        return watch is not None and watch.is_due(len(self.tokens))

    @property
    def banned(self) -> frozenset[int]:
        """End-of-sequence tokens, while min_tokens forbids the end."""
        return self.eos if len(self.tokens) < self.params.min_tokens else frozenset()

    def accept(self, token: int, logprob: dict[str, Any] | None) -> list[Event]:
        """Add a sampled token; -> what the stream is told."""
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
            self.pending.append(logprob)
        if token in self.eos and not self.params.ignore_eos:
            self.finish_reason = "stop"
            return self.finish()
        piece = self.text.push(token)
        if self.text.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.job.room:
            self.finish_reason = "length"
        events: list[Event] = [self._delta(piece)] if piece else []
        return events if self.finish_reason is None else events + self.finish()

    def finish(self) -> list[Event]:
        """The last words and the candidate; cut short, its reason is the length it was allowed."""
        cut = self.finish_reason is None
        self.finish_reason = self.finish_reason or "length"
        rest = self.text.finish()
        told: list[Event] = [self._delta(rest)] if rest or self.pending or self.unsaid else []
        text = self.job.echo + self.text.text
        logprobs = self._wire_logprobs(self.logprobs)
        if self.job.draw.kind == "chat":
            message = {"role": "assistant", "content": text, "refusal": None}
            choice: dict[str, Any] = {
                "message": message,
                "logprobs": logprobs,
                "finish_reason": self.finish_reason,
            }
        else:
            choice = {"text": text, "logprobs": logprobs, "finish_reason": self.finish_reason}
        return [
            *told,
            Candidate(
                self.index, choice, 0, len(self.prompt_ids), len(self.tokens), interrupted=cut
            ),
        ]

    def fail(self, why: str) -> list[Event]:
        """Nothing more can be sampled."""
        self.finish_reason = "error"
        return [
            Candidate(
                self.index, {}, 0, len(self.prompt_ids), len(self.tokens), error=why, status=500
            )
        ]

    def _delta(self, piece: str) -> Delta:
        logprobs, self.pending = self._wire_logprobs(self.pending), []
        piece, self.unsaid = self.unsaid + piece, ""
        choice = {"delta": {"content": piece}} if self.job.draw.kind == "chat" else {"text": piece}
        return Delta(self.index, {**choice, "logprobs": logprobs})

    def _wire_logprobs(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        if self.params.logprobs is None:
            return None
        if self.job.draw.kind == "chat":
            return {"content": list(entries), "refusal": None}
        offsets, offset = (
            [],
            sum(len(e["token"]) for e in self.logprobs[: len(self.logprobs) - len(entries)]),
        )
        for entry in entries:
            offsets.append(offset)
            offset += len(entry["token"])
        return {
            "tokens": [_name(e) for e in entries],
            "token_logprobs": [e["logprob"] for e in entries],
            "top_logprobs": [{_name(t): t["logprob"] for t in e["top_logprobs"]} for e in entries]
            if self.params.logprobs
            else None,
            "text_offset": offsets,
        }


def logprob_entries(
    model: Model, logits: torch.Tensor, aligned: torch.Tensor, rows: list[Row], tokens: list[int]
) -> list[dict[str, Any] | None]:
    """OpenAI's entry per row that asked for logprobs: of the frozen model itself, before temperature, biases and penalties.

    A row that is steered has `aligned_logprob` beside it: the token's under the logits that were sampled from, before temperature.
    """
    asking = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    entries: list[dict[str, Any] | None] = [None] * len(rows)
    if not asking:
        return entries
    logprobs = torch.log_softmax(logits[asking], dim=-1)
    alternatives = {i: rows[i].params.logprobs or 0 for i in asking}
    top = logprobs.topk(min(max(alternatives.values()), logprobs.shape[-1]), dim=-1)
    for j, (i, k) in enumerate(alternatives.items()):
        best = zip(top.indices[j, :k].tolist(), top.values[j, :k].tolist(), strict=True)
        entry = _entry(model, tokens[i], float(logprobs[j, tokens[i]]))
        entries[i] = entry = {
            **entry,
            "top_logprobs": [_entry(model, token, value) for token, value in best],
        }
        if rows[i].job.draw.steering:
            entry["aligned_logprob"] = max(
                float(torch.log_softmax(aligned[i], dim=-1)[tokens[i]]), -9999.0
            )
    return entries


def _entry(model: Model, token: int, logprob: float) -> dict[str, Any]:
    data = token_bytes(model.tokenizer, token)
    # JSON has no infinity; a token that a bias or a ban alone made possible is OpenAI's -9999.
    return {
        "token": data.decode(errors="replace"),
        "logprob": max(logprob, -9999.0),
        "bytes": list(data),
    }


def _name(entry: dict[str, Any]) -> str:
    """A token as text completions name it: parts of characters by their bytes, so that no two share a name."""
    data = bytes(entry["bytes"])
    return (
        str(entry["token"])
        if data == entry["token"].encode()
        else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
    )
