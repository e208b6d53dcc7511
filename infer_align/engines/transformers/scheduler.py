"""One thread, one running batch: candidates join and leave it at step boundaries, and no request waits for another to finish."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from infer_align.engines import Event, Stream
from infer_align.engines._sampling import SamplingParams
from infer_align.engines.transformers.cache import RowCache
from infer_align.engines.transformers.model import Model, Prompt
from infer_align.engines.transformers.rows import Row, logprob_entries
from infer_align.engines.transformers.sampler import sample
from infer_align.engines.transformers.text import TextStream
from infer_align.errors import EngineFailed
from infer_align.types import Candidate, Draw

if TYPE_CHECKING:
    from infer_align.engines.transformers import Transformers

log = logging.getLogger("infer_align")


@dataclass(eq=False)
class Job:
    """One draw on its way: waiting, prefilled, then as rows in the batch."""

    draw: Draw
    params: SamplingParams
    prompt: Prompt
    room: int  # tokens that each candidate may generate
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    stream: Stream = field(init=False)
    closed: bool = False  # set from the event loop: nobody listens any more
    rows: deque[Row] = field(default_factory=deque)  # the candidates that have not joined the batch; filled by the scheduler
    cache: RowCache = field(default_factory=RowCache)  # the prompt's one row, filled by prefill
    logits: torch.Tensor | None = None  # [1, V] after the prompt; None until it is prefilled
    stops: set[int | None] = field(default_factory=set)  # candidates to finish now; None means all
    unfinished: int = field(init=False)  # candidates still to be told; counted down by the scheduler

    def __post_init__(self) -> None:
        self.unfinished = self.draw.n
        self.stream = Stream(self.draw.n, self.stops.add, self._close)

    def _close(self) -> None:
        self.closed = True

    @property
    def echo(self) -> str:
        """What a text completion repeats before its own words."""
        return self.prompt.text if self.draw.body.get("echo") else ""

    @property
    def width(self) -> int:
        """Columns of the cache that each candidate may come to need."""
        return len(self.prompt.ids) + self.room

    def stopping(self, row: Row) -> bool:
        """Whether the candidate is to be finished now."""
        return None in self.stops or row.index in self.stops


class Scheduler(threading.Thread):
    """Runs the model. Everything below `run` happens in its thread alone."""

    def __init__(self, model: Model, config: Transformers) -> None:
        super().__init__(name="scheduler", daemon=True)
        self.model = model
        self.max_batch = config.max_batch
        self.prefill_tokens = config.prefill_tokens
        self.capacity = _capacity(model, config.kv_cache_gib)  # cells of the cache: rows x columns
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._halt = False
        self._jobs: set[Job] = set()  # everything that somebody waits for
        self._waiting: deque[Job] = deque()  # not yet prefilled
        self._ready: deque[Job] = deque()  # prefilled, with candidates that have not joined
        self._rows: list[Row] = []
        self._cache = RowCache()
        self._told: list[tuple[Job, Event | EngineFailed]] = []

    def submit(self, job: Job) -> None:
        """Queue a job; from any thread."""
        self._inbox.put(job)

    def stop(self) -> None:
        """End the thread after the current step, and every job with an error."""
        self._halt = True
        self._inbox.put(None)
        self.join()

    def run(self) -> None:
        """Step until stopped. A step that fails ends the requests that were in it, not the engine."""
        while not self._halt:
            self._receive()
            try:
                self._step()
            except Exception as error:
                log.exception("a step failed")
                self._fail(f"the engine failed: {error}")
            self._publish()
        self._fail("the engine was shut down")
        self._publish()

    def _receive(self) -> None:
        idle = not (self._waiting or self._ready or self._rows)
        while idle or not self._inbox.empty():
            job = self._inbox.get()
            idle = False
            if job is not None:
                self._jobs.add(job)
                job.rows.extend(self._new_rows(job))
                self._waiting.append(job)

    def _new_rows(self, job: Job) -> Iterable[Row]:
        for i, seed in enumerate(job.draw.seeds):
            yield Row(job, i, seed, TextStream(self.model.tokenizer, job.params.stop), self.model.eos)

    def _step(self) -> None:
        self._leave()
        self._prefill()
        self._join()
        if self._rows:
            self._decode()

    def _leave(self) -> None:
        """Drop what nobody waits for, and finish what was told to stop."""
        for jobs in (self._waiting, self._ready):
            for job in [*jobs]:
                for row in [row for row in job.rows if job.stopping(row)]:
                    job.rows.remove(row)
                    self._tell(job, row.finish())
                if job.closed or not job.rows:
                    jobs.remove(job)
        for row in self._rows:
            if row.finish_reason is None and row.job.stopping(row):
                self._tell(row.job, row.finish())
        self._jobs = {job for job in self._jobs if job.unfinished and not job.closed}
        self._keep([i for i, row in enumerate(self._rows) if row.finish_reason is None and not row.job.closed])

    def _keep(self, kept: list[int]) -> None:
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[i] for i in kept]
        # The newest token of each row has no column yet: it is the next step's input.
        columns = max((row.length - 1 for row in self._rows), default=0)
        self._cache = self._cache.take(kept, columns) if kept else RowCache()

    def _prefill(self) -> None:
        """Read up to `prefill_tokens` of prompts: several short ones at once, or the next part of a long one."""
        if not self._waiting or len(self._rows) >= self.max_batch:
            return
        first = self._waiting[0]
        done = first.cache.length
        if done or len(first.prompt.ids) > self.prefill_tokens:
            part = first.prompt.ids[done : done + self.prefill_tokens]
            logits = self._forward([part], first.cache, [done + len(part)])
            if done + len(part) == len(first.prompt.ids):
                first.logits = logits
                self._ready.append(self._waiting.popleft())
            return
        batch: list[Job] = []
        while self._waiting and self._fits_prefill([*batch, self._waiting[0]]):
            batch.append(self._waiting.popleft())
        cache = RowCache()
        logits = self._forward([job.prompt.ids for job in batch], cache, [len(job.prompt.ids) for job in batch])
        for i, job in enumerate(batch):
            job.cache = cache.take([i], len(job.prompt.ids))
            job.logits = logits[i : i + 1]
        self._ready.extend(batch)

    def _fits_prefill(self, jobs: list[Job]) -> bool:
        return len(jobs) * max(len(job.prompt.ids) for job in jobs) <= self.prefill_tokens

    def _forward(self, parts: list[list[int]], cache: RowCache, lengths: list[int]) -> torch.Tensor:
        width = max(len(part) for part in parts)
        ids = torch.tensor([[0] * (width - len(part)) + part for part in parts], device=self.model.device)
        return self.model.forward(ids, cache, lengths)

    def _join(self) -> None:
        """Let prefilled candidates in, one of each job in turn, so that a large request does not hold up a small one."""
        joining: list[Row] = []
        while self._ready and self._fits([*self._rows, *joining, self._ready[0].rows[0]]):
            job = self._ready.popleft()
            joining.append(job.rows.popleft())
            if job.rows:
                self._ready.append(job)
        if not joining:
            return
        logits = torch.cat([row.job.logits for row in joining if row.job.logits is not None])
        self._advance(joining, logits)
        joined = [row for row in joining if row.finish_reason is None]
        for job in dict.fromkeys(row.job for row in joined):
            rows = [row for row in joined if row.job is job]
            cache = job.cache.take([0] * len(rows), len(job.prompt.ids))
            self._cache = self._cache.join(cache) if self._rows else cache
            self._rows += rows

    def _fits(self, rows: list[Row]) -> bool:
        return len(rows) <= self.max_batch and len(rows) * max(row.job.width for row in rows) <= self.capacity

    def _decode(self) -> None:
        logits = self._forward([row.tokens[-1:] for row in self._rows], self._cache, [row.length for row in self._rows])
        self._advance(self._rows, logits)

    def _advance(self, rows: list[Row], logits: torch.Tensor) -> None:
        """The one place where logits become tokens."""
        tokens = sample(logits, rows)
        entries = logprob_entries(self.model, logits, rows, tokens)
        for row, token, entry in zip(rows, tokens, entries, strict=True):
            self._tell(row.job, row.accept(token, entry))

    def _tell(self, job: Job, events: Iterable[Event]) -> None:
        for event in events:
            self._told.append((job, event))
            job.unfinished -= isinstance(event, Candidate)

    def _fail(self, message: str) -> None:
        self._told += [(job, EngineFailed(message, status=500)) for job in self._jobs if job.unfinished]
        self._jobs.clear()
        self._waiting.clear()
        self._ready.clear()
        self._rows, self._cache = [], RowCache()

    def _publish(self) -> None:
        """Hand the step's events over, with one call per event loop."""
        told, self._told = self._told, []
        for loop in {job.loop for job, _ in told}:
            mine = [(job, event) for job, event in told if job.loop is loop]
            if not loop.is_closed():
                loop.call_soon_threadsafe(_deliver, mine)


def _deliver(told: list[tuple[Job, Event | EngineFailed]]) -> None:
    for job, event in told:
        job.stream.put(event)


def _capacity(model: Model, gib: float) -> int:
    config = model.lm.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * config.num_hidden_layers * heads * dim * model.lm.dtype.itemsize
    return int(gib * 2**30 / bytes_per_token)
