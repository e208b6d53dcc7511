"""A draw on its way through the engine (`Job`) and each of its candidates (`Row`)."""

from __future__ import annotations

import asyncio
from base64 import b32encode
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from infer_align.decoding.cache import RowCache
from infer_align.decoding.call_format import ToolUse
from infer_align.decoding.call_stream import CallStream
from infer_align.decoding.constraint import Constraint, Matcher
from infer_align.decoding.guidance import CandidateGuidance
from infer_align.decoding.params import SamplingParams
from infer_align.decoding.text import TextStream
from infer_align.engines import Stream
from infer_align.engines.transformers.choices import (
    Entry,
    chat_logprobs,
    completion_logprobs,
    delta_choice,
    finished_choice,
)
from infer_align.engines.transformers.model import Step
from infer_align.engines.transformers.prompt import Prompt
from infer_align.types import Body, Candidate, Delta, Draw, Event
from infer_align.values import Value
from infer_align.values.head import HeadValue
from infer_align.values.lookahead import ValueLM


@dataclass(eq=False, slots=True)
class Context:
    """A prompt that the model reads for a job: the request's own, or one with a trait's prompt.

    Attributes:
        ids: its tokens.
        cache: their keys and values, one row; filled by prefill.
        step: the model's result after the prompt, one row; set by prefill.
    """

    ids: list[int]
    cache: RowCache = field(default_factory=RowCache)
    step: Step | None = None


@dataclass(frozen=True, slots=True)
class Guiding:
    """The contexts that guide a job, beside the request's own.

    Attributes:
        prompts: the tokens of each. They differ from each other and from the request's.
        candidate: the guidance of each candidate.
    """

    prompts: tuple[list[int], ...]
    candidate: CandidateGuidance


@dataclass(eq=False)
class Job:
    """One draw: waiting, then prefilled, then as rows in the batch.

    Each of its candidates takes one row of the cache per context. All of them step together, and
    each sampled token goes to all contexts of its candidate.

    Attributes:
        draw: the draw.
        params: its sampling parameters.
        prompt: its rendered prompt.
        max_tokens: tokens that each candidate may generate.
        guiding: the contexts that guide it; None if it is not guided.
        steering: the loaded values that steer it, with their weights. A value may be replaced
            later; the job keeps the one that it was bound to.
        estimates: the loaded heads whose estimates it reports, with their weights.
        constraint: the grammar that every candidate follows; None if the text is free.
        call_constraint: the grammar that a candidate follows once it has begun a tool call by
            itself; None if it follows another one or none.
        tools: the tools that candidates may call; None without tools.
        stop_ids: tokens at which the request ends, beside the model's end tokens.
        entries: the logprob entries of the prompt, if the request echoes it with logprobs; set
            before the job is submitted.
        loop: the event loop of the caller.
        stream: what the caller reads.
        closed: True once the caller has left; set from the event loop.
        stopped: candidates to be finished now; None stands for all. Set from the event loop.
        rows: the candidates that have not joined the batch; set by the scheduler.
        contexts: the prompts that are read: the request's own, then those that guide it.
        cache: keys and values of all contexts, one row each; set when all of them are read.
        step: the model's results after the contexts, one row each; set with the cache.
        value_caches: keys and values of the prompt in the value LMs; set by prefill.
        unfinished: candidates that are not finished; counted down by the scheduler.
    """

    draw: Draw
    params: SamplingParams
    prompt: Prompt
    max_tokens: int
    guiding: Guiding | None = None
    steering: Mapping[Value, float] = field(default_factory=dict)
    estimates: Mapping[HeadValue, float] = field(default_factory=dict)
    constraint: Constraint | None = None
    call_constraint: Constraint | None = None
    tools: ToolUse | None = None
    stop_ids: frozenset[int] = frozenset()
    entries: list[Entry] = field(default_factory=list)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    stream: Stream = field(init=False)
    closed: bool = False
    stopped: set[int | None] = field(default_factory=set)
    rows: deque[Row] = field(default_factory=deque)
    contexts: tuple[Context, ...] = field(init=False)
    cache: RowCache = field(default_factory=RowCache)
    step: Step | None = None
    value_caches: dict[ValueLM, RowCache] = field(default_factory=dict)
    unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        self.unfinished = self.draw.n
        guiding = self.guiding.prompts if self.guiding else ()
        self.contexts = tuple(Context(ids) for ids in (self.prompt.ids, *guiding))
        self.stream = Stream(self.draw.n, self.stopped.add, self._close)

    def _close(self) -> None:
        self.closed = True

    @property
    def echo(self) -> str:
        """Return the text that a text completion repeats before its own."""
        return self.prompt.text if self.params.echo else ""

    @property
    def longest_prompt(self) -> int:
        """Return the tokens of the longest context: columns of the cache after prefill."""
        return max(len(context.ids) for context in self.contexts)

    @property
    def width(self) -> int:
        """Return the columns of the cache that each candidate may need."""
        return self.longest_prompt + self.max_tokens

    @property
    def unread(self) -> list[Context]:
        """Return the contexts that prefill has not read to the end, in their order."""
        return [context for context in self.contexts if context.step is None]

    def gather(self) -> None:
        """Put the keys, values and results of all contexts together; all of them are read."""
        self.cache = self.contexts[0].cache
        for context in self.contexts[1:]:
            self.cache = self.cache.join(context.cache)
        steps = [context.step for context in self.contexts if context.step is not None]
        self.step = Step.stack(steps)
        for context in self.contexts:
            context.cache = RowCache()

    def is_stopped(self, index: int) -> bool:
        """Return True if the candidate is to be finished now."""
        return None in self.stopped or index in self.stopped


@dataclass(slots=True, eq=False)
class Row:
    """One candidate of a job; a row of the running batch while it is decoded.

    Attributes:
        job: its job.
        index: its index in the job.
        seed: its own seed.
        text: the text of its tokens.
        eos: the model's end-of-sequence tokens.
        tokens: the tokens sampled so far.
        matcher: follows it through the grammar of its job, or of the call that it has begun; None
            while the text is free.
        call_constraint: the grammar that it follows once it has begun a call by itself; None
            afterwards.
        calls: finds the tool calls in its text; None without tools.
        entries: the logprob entry of each token, those of an echoed prompt first, if the request
            reports logprobs.
        streamed_entries: number of entries that deltas have carried.
        pending_echo: the echo, until the first delta.
        finish_reason: None while it is decoded.
    """

    job: Job
    index: int
    seed: int
    text: TextStream
    eos: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    matcher: Matcher | None = field(init=False)
    call_constraint: Constraint | None = field(init=False)
    calls: CallStream | None = None
    entries: list[Entry] = field(init=False)
    streamed_entries: int = 0
    pending_echo: str = field(init=False)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.pending_echo = self.job.echo
        self.entries = [*self.job.entries]
        constraint = self.job.constraint
        self.matcher = constraint.matcher() if constraint else None
        self.call_constraint = self.job.call_constraint
        if self.job.tools is not None:
            tools = self.job.tools
            self.calls = CallStream(tools.request, tools.form, self._call_id)

    @property
    def params(self) -> SamplingParams:
        """Return the job's sampling parameters."""
        return self.job.params

    @property
    def prompt_ids(self) -> list[int]:
        """Return the tokens of the job's prompt."""
        return self.job.prompt.ids

    @property
    def lanes(self) -> int:
        """Return the rows of the cache that the candidate takes: one per context."""
        return len(self.job.contexts)

    @property
    def lengths(self) -> list[int]:
        """Return the tokens of each context, whose keys and values the next step needs."""
        return [len(context.ids) + len(self.tokens) for context in self.job.contexts]

    @property
    def guidance(self) -> CandidateGuidance | None:
        """Return the guidance of the candidate; None if it is not guided."""
        return self.job.guiding.candidate if self.job.guiding else None

    @property
    def is_aligned(self) -> bool:
        """Return True if the draw asks for values or for guidance, with weights of 0 too."""
        draw = self.job.draw
        return draw.steering is not None or draw.guidance is not None

    @property
    def is_due(self) -> bool:
        """Return True if an estimate is to be reported before the next token."""
        schedule = self.job.draw.estimates
        return schedule is not None and schedule.is_due(len(self.tokens))

    @property
    def banned(self) -> frozenset[int]:
        """Return the tokens that end the text, while min_tokens forbids the end."""
        must_end = self.matcher is not None and self.matcher.finished
        is_short = len(self.tokens) < self.params.min_tokens
        return self.eos | self.job.stop_ids if is_short and not must_end else frozenset()

    def accept(self, token: int, entry: Entry | None) -> list[Event]:
        """Add a sampled token and return the events that result."""
        self.tokens.append(token)
        if entry is not None:
            self.entries.append(entry)
        if self._ends_with(token):
            self.finish_reason = "stop"
            return self.finish()
        piece = self.text.push(token, may_stop=len(self.tokens) > self.params.min_tokens)
        if self.text.stopped or self._follows_to_the_end(token):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.job.max_tokens:
            self.finish_reason = "length"
        events = self._deltas(piece) if piece else []
        self._follow_begun_call()
        return events if self.finish_reason is None else events + self.finish()

    def _ends_with(self, token: int) -> bool:
        """Return True if the token ends the text and is not part of it."""
        is_eos = token in self.eos and not self.params.ignore_eos
        return is_eos or token in self.job.stop_ids

    def _follows_to_the_end(self, token: int) -> bool:
        """Take the token through the grammar; return True if nothing can follow it."""
        if self.matcher is None:
            return False
        self.matcher.consume(token)
        return self.matcher.finished

    def _follow_begun_call(self) -> None:
        """Constrain the next tokens if the model has begun a call by itself."""
        constraint = self.call_constraint
        if constraint is None or self.calls is None:
            return
        begun = self.calls.begun_call()
        held_back = self.text.held_back
        if begun is not None and held_back is not None:
            # Without a matcher, the text that is there already does not fit, and stays free.
            self.matcher = constraint.matcher_after(begun + held_back)
            self.call_constraint = None

    def finish(self) -> list[Event]:
        """Return the last delta and the candidate.

        A candidate without a finish_reason is interrupted; it then ends because of its length.
        """
        interrupted = self.finish_reason is None
        self.finish_reason = self.finish_reason or "length"
        events = self._last_deltas(self.text.finish())
        text = self.job.echo + self.text.text
        message: Body | None = None
        reason = self.finish_reason
        if self.calls is not None:
            message = self.calls.message()
            reason = self.calls.finish_reason(reason)
        choice = finished_choice(self.job.draw.kind, text, self._logprobs(0), reason, message)
        return [*events, replace(self._candidate(choice), interrupted=interrupted)]

    def fail(self) -> list[Event]:
        """Return the failed candidate of a row that no token can continue."""
        reason = "the model's logits are not finite; check its weights and its dtype"
        status = 500
        if self.matcher is not None and self.matcher.error:
            reason = f"the grammar cannot be followed any further: {self.matcher.error}"
            status = 400
        self.finish_reason = "error"
        return [replace(self._candidate({}), error=reason, status=status)]

    def _candidate(self, choice: Body) -> Candidate:
        """Return the candidate with what it has cost so far."""
        guiding = self.job.contexts[1:]
        return Candidate(
            self.index,
            choice,
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=len(self.tokens),
            context_prompt_tokens=sum(len(context.ids) for context in guiding),
            context_completion_tokens=len(guiding) * len(self.tokens),
        )

    def _deltas(self, text: str) -> list[Event]:
        """Return the delta of new text; none while it may turn out to be a tool call."""
        if self.calls is None:
            return [self._delta({"content": self.pending_echo + text})]
        fields = self.calls.push(text)
        return [self._delta(fields)] if fields else []

    def _last_deltas(self, text: str) -> list[Event]:
        """Return the delta of the last text, if it holds anything."""
        if self.calls is None:
            fields: Body = {"content": self.pending_echo + text}
            has_fields = bool(fields["content"])
        else:
            fields = self.calls.finish(text)
            has_fields = bool(fields)
        has_entries = self.streamed_entries < len(self.entries)
        return [self._delta(fields)] if has_fields or has_entries else []

    def _delta(self, fields: Body) -> Delta:
        logprobs = self._logprobs(self.streamed_entries)
        self.streamed_entries = len(self.entries)
        self.pending_echo = ""
        return Delta(self.index, delta_choice(self.job.draw.kind, fields, logprobs))

    def _call_id(self, index: int) -> str:
        """Return the id of a tool call: the same for the same seed and prompt, and for no others.

        Some chat templates want exactly nine letters and digits.
        """
        origin = f"{self.seed} {index} {self.job.prompt.text}".encode(errors="replace")
        return b32encode(blake2b(origin).digest()).decode().lower()[:9]

    def _logprobs(self, start: int) -> Body | None:
        """Return the logprobs field for the entries from `start` on; None without logprobs."""
        if self.params.logprobs is None:
            return None
        entries = self.entries[start:]
        if self.job.draw.kind == "chat":
            return chat_logprobs(entries)
        characters = sum(len(entry["token"]) for entry in self.entries[:start])
        alternatives = self.params.logprobs > 0
        return completion_logprobs(entries, characters, alternatives=alternatives)
