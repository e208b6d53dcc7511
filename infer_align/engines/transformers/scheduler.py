"""One thread, one running batch: candidates join and leave it at step boundaries, and no request waits for another to finish."""

from __future__ import annotations

import itertools
import logging
import operator
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch

from infer_align.decoding.cache import RowCache
from infer_align.decoding.sampler import adjust, sample
from infer_align.decoding.siblings import choose_siblings
from infer_align.decoding.steering import expected_values, steer
from infer_align.decoding.text import TextStream
from infer_align.engines import Event
from infer_align.engines.transformers.batch import Batch
from infer_align.engines.transformers.model import Model, Step
from infer_align.engines.transformers.reading import Question, Read, read_group, take_group
from infer_align.engines.transformers.rows import Job, Row, logprob_entries
from infer_align.engines.transformers.steering import Steerer
from infer_align.errors import AlignError, EngineFailed, Unavailable
from infer_align.types import Candidate, Estimate

if TYPE_CHECKING:
    from infer_align.engines.transformers import Transformers

log = logging.getLogger("infer_align")


class Scheduler(threading.Thread):
    """Runs the model. Everything below `run` happens in its thread alone."""

    def __init__(self, model: Model, steerer: Steerer, config: Transformers) -> None:
        super().__init__(name="scheduler", daemon=True)
        self.model = model
        self.steerer = steerer
        self.max_batch = config.max_batch
        self.prefill_tokens = config.prefill_tokens
        self._kv_bytes = config.kv_cache_gib * 2**30
        self._inbox: queue.SimpleQueue[Job | Question | None] = queue.SimpleQueue()
        self._halt = False
        self._over = False  # nothing is received any more
        self._jobs: set[Job] = set()  # everything that somebody waits for
        self._questions: deque[Question] = deque()  # not yet read
        self._waiting: deque[Job] = deque()  # not yet prefilled
        self._ready: deque[Job] = deque()  # prefilled, with candidates that have not joined
        self._batch = Batch()
        self._told: list[tuple[Job, Event | AlignError]] = []

    @property
    def capacity(self) -> int:
        """Cells of the cache, rows x columns; fewer when a value LM has been added, whose keys and values count too."""
        return int(self._kv_bytes / (self.model.cell_bytes + self.steerer.cell_bytes))

    def submit(self, job: Job | Question) -> None:
        """Queue a job or a question; from any thread.

        Raises:
            Unavailable: the thread has ended or is about to.
        """
        self._inbox.put(job)
        if self._over:
            raise Unavailable("the engine was shut down")

    def stop(self) -> None:
        """End the thread after the current step, and every job with an error."""
        self._halt = True
        self._inbox.put(None)
        self.join()

    def run(self) -> None:
        """Step until stopped."""
        with torch.inference_mode():
            while not self._halt:
                self._receive()
                self._step()
                self._publish()
        self._over = True
        self._inbox.put(None)
        self._receive()
        closed = Unavailable("the engine was shut down")
        self._fail(self._jobs, closed)
        self._publish()
        self._answer([(question, closed) for question in self._questions])

    def _receive(self) -> None:
        idle = not self._jobs and not self._questions
        while idle or not self._inbox.empty():
            job = self._inbox.get()
            idle = False
            if isinstance(job, Question):
                self._questions.append(job)
            elif job is not None:
                self._jobs.add(job)
                job.rows.extend(self._new_rows(job))
                self._waiting.append(job)

    def _new_rows(self, job: Job) -> Iterable[Row]:
        for i, seed in enumerate(job.draw.seeds):
            yield Row(
                job, i, seed, TextStream(self.model.tokenizer, job.params.stop), self.model.eos
            )

    def _step(self) -> None:
        self._leave()
        self._read()
        self._prefill()
        self._join()
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
        for row in self._batch.rows:
            if row.finish_reason is None and row.job.stopping(row):
                self._tell(row.job, row.finish())
        self._jobs = {job for job in self._jobs if job.unfinished and not job.closed}
        self._batch = self._batch.take(
            [
                i
                for i, row in enumerate(self._batch.rows)
                if row.finish_reason is None and not row.job.closed
            ]
        )

    def _read(self) -> None:
        """Answer questions, group by group, until `prefill_tokens` of prompts have been read."""
        left, cells = self.prefill_tokens, max(1, self.capacity // 8)
        while left > 0 and self._questions:
            group = [q for q in take_group(self._questions, left, cells) if not q.answer.done()]
            left -= sum(len(question.ids) for question in group)
            if not group:
                continue
            outcomes: Sequence[Read | Exception]
            try:
                outcomes = read_group(self.model, group, self.prefill_tokens, cells)
            except AlignError as error:
                outcomes = [error] * len(group)
            except Exception as error:  # whatever the model's code raises
                log.exception("a reading failed")
                outcomes = [EngineFailed(f"the engine failed: {error}", status=500)] * len(group)
            self._answer(list(zip(group, outcomes, strict=True)))

    def _answer(self, told: Sequence[tuple[Question, Read | Exception]]) -> None:
        for question, outcome in told:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                question.loop.call_soon_threadsafe(question.tell, outcome)

    def _prefill(self) -> None:
        """Read up to `prefill_tokens` of prompts: several short ones at once, or the next part of a long one."""
        if not self._waiting or len(self._batch.rows) >= self.max_batch or self._is_ahead([]):
            return
        first = self._waiting[0]
        done = first.cache.length
        if done or len(first.prompt.ids) > self.prefill_tokens:
            part = first.prompt.ids[done : done + self.prefill_tokens]
            with self._failing([first]):
                step = self._forward([part], first.cache, [done + len(part)])
                if done + len(part) == len(first.prompt.ids):
                    self._prefilled(first, step)
                    self._ready.append(self._waiting.popleft())
            return
        batch: list[Job] = []
        while (
            self._waiting
            and self._fits_prefill([*batch, self._waiting[0]])
            and not self._is_ahead(batch)
        ):
            batch.append(self._waiting.popleft())
        cache = RowCache()
        with self._failing(batch):
            step = self._forward(
                [job.prompt.ids for job in batch], cache, [len(job.prompt.ids) for job in batch]
            )
            for i, job in enumerate(batch):
                job.cache = cache.take([i], len(job.prompt.ids))
                self._prefilled(job, Step(step.logits[i : i + 1], step.hidden[i : i + 1]))
            self._ready.extend(batch)

    def _prefilled(self, job: Job, step: Step) -> None:
        job.step = step
        job.value_caches = self.steerer.prefill(job.steering, job.prompt.ids)

    def _is_ahead(self, batch: list[Job]) -> bool:
        """Prompts that wait for room hold memory too: beside the first, they may take an eighth of what the batch may."""
        return sum(len(job.prompt.ids) for job in [*self._ready, *batch][1:]) > self.capacity // 8

    def _fits_prefill(self, jobs: list[Job]) -> bool:
        return len(jobs) * max(len(job.prompt.ids) for job in jobs) <= self.prefill_tokens

    def _forward(self, parts: list[list[int]], cache: RowCache, lengths: list[int]) -> Step:
        width = max(len(part) for part in parts)
        ids = torch.tensor(
            [[0] * (width - len(part)) + part for part in parts], device=self.model.device
        )
        return self.model.forward(ids, cache, lengths)

    def _join(self) -> None:
        """Let prefilled candidates in, one of each job in turn, so that a large request does not hold up a small one."""
        joining: list[Row] = []
        while self._ready and self._fits([*self._batch.rows, *joining, self._ready[0].rows[0]]):
            job = self._ready.popleft()
            joining.append(job.rows.popleft())
            if job.rows:
                self._ready.append(job)
        if not joining:
            return
        with self._failing(row.job for row in joining):
            newcomers = Batch()
            for job in dict.fromkeys(row.job for row in joining):
                of_job = [row for row in joining if row.job is job]
                newcomers = newcomers.join(Batch.of_prompt(job, of_job))
            steps = [row.job.step for row in newcomers.rows if row.job.step]
            step = Step(torch.cat([s.logits for s in steps]), torch.cat([s.hidden for s in steps]))
            self._batch = self._batch.join(self._advance(newcomers, step))

    def _fits(self, rows: list[Row]) -> bool:
        return (
            len(rows) <= self.max_batch
            and len(rows) * max(row.job.width for row in rows) <= self.capacity
        )

    def _decode(self) -> None:
        rows = self._batch.rows
        if not rows:
            return
        with self._failing(row.job for row in rows):
            step = self._forward(
                [row.tokens[-1:] for row in rows], self._batch.cache, [row.length for row in rows]
            )
            self._batch = self._advance(self._batch, step)

    def _advance(self, batch: Batch, step: Step) -> Batch:
        """The one place where logits become tokens; -> the rows that go on."""
        batch, step = self._sound(batch, step)
        rows = batch.rows
        if not rows:
            return batch
        logits, candidates = adjust(step.logits, rows), None
        if batch.steering is None:
            batch.steering = self.steerer.steering_batch(rows)
        if batch.steering is not None:
            logits, candidates = steer(logits, step.hidden, batch.steering, batch.value_caches)
        self._report_estimates(logits, step.hidden, rows)
        tokens = sample(logits, rows)
        entries = logprob_entries(self.model, step.logits, logits, rows, tokens)
        if candidates is not None:
            choose_siblings(batch.value_caches.values(), candidates, tokens)
        for row, token, entry in zip(rows, tokens, entries, strict=True):
            self._tell(row.job, row.accept(token, entry))
        return batch.take([i for i, row in enumerate(rows) if row.finish_reason is None])

    def _report_estimates(
        self, logits: torch.Tensor, hidden: torch.Tensor, rows: Sequence[Row]
    ) -> None:
        """Publish the estimates of the rows that are due."""
        due = [i for i, row in enumerate(rows) if row.is_due]
        if not due:
            return
        weights = [rows[i].job.estimates for i in due]
        estimates = expected_values(logits[due], hidden[due], weights).tolist()
        for i, value in zip(due, estimates, strict=True):
            row = rows[i]
            self._tell(row.job, [Estimate(row.index, len(row.tokens), value)])

    def _sound(self, batch: Batch, step: Step) -> tuple[Batch, Step]:
        """Without the rows whose logits are not finite: they fail, alone."""
        sound = step.logits.amax(dim=-1).isfinite().tolist()
        if all(sound):
            return batch, step
        for row in itertools.compress(batch.rows, map(operator.not_, sound)):
            self._tell(
                row.job,
                row.fail(
                    "the model's logits are not finite; its weights or its dtype are at fault"
                ),
            )
        kept = [i for i, fine in enumerate(sound) if fine]
        return batch.take(kept), Step(step.logits[kept], step.hidden[kept])

    def _tell(self, job: Job, events: Iterable[Event]) -> None:
        for event in events:
            self._told.append((job, event))
            job.unfinished -= isinstance(event, Candidate)

    @contextmanager
    def _failing(self, jobs: Iterable[Job]) -> Iterator[None]:
        """A part of a step: if it fails, it ends the requests that were in it, not the engine."""
        jobs = {*jobs}
        try:
            yield
        except Exception as error:  # whatever the model's code raises
            log.exception("a step failed")
            self._fail(jobs, EngineFailed(f"the engine failed: {error}", status=500))

    def _fail(self, jobs: Iterable[Job], error: AlignError) -> None:
        for job in jobs:
            if job.unfinished:
                self._told.append((job, error))
            job.closed = True  # the next step lets go of all that belongs to it

    def _publish(self) -> None:
        """Hand the step's events over, with one call per event loop."""
        told, self._told = self._told, []
        for loop in {job.loop for job, _ in told}:
            mine = [(job, event) for job, event in told if job.loop is loop]
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(_deliver, mine)


def _deliver(told: list[tuple[Job, Event | AlignError]]) -> None:
    for job, event in told:
        job.stream.put(event)
