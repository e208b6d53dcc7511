"""Continuous batching: one thread decodes one running batch.

Candidates join and leave the batch between two steps, so no request waits for another to finish.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterable, Sequence

import torch

from infer_align.checkpoints.threads import compute_alone
from infer_align.decoding.cache import RowCache
from infer_align.decoding.constraint import constrain
from infer_align.decoding.estimates import expected_values
from infer_align.decoding.guidance import guide_rows
from infer_align.decoding.sampler import adjust
from infer_align.decoding.siblings import keep_sampled_siblings
from infer_align.decoding.text import TextStream
from infer_align.engines.transformers.batch import RowBatch
from infer_align.engines.transformers.choices import Entry, logprob_entries
from infer_align.engines.transformers.drawing import draw_tokens
from infer_align.engines.transformers.model import Model, Step
from infer_align.engines.transformers.outbox import Outbox
from infer_align.engines.transformers.question_queue import AnyQuestion, QuestionQueue
from infer_align.engines.transformers.rows import Context, Job, Row
from infer_align.engines.transformers.steering import LoadedValues
from infer_align.errors import Unavailable
from infer_align.types import Estimate

# Questions, and prompts that wait for room in the batch, may each take this share of the cache.
SHARE_OF_CACHE = 8


class Scheduler(threading.Thread):
    """Runs the model. All private methods run in its thread alone.

    Args:
        model: the frozen model.
        values: the values that steer it.
        max_batch: candidates that are decoded at once; each guiding context counts as one more.
        prefill_tokens: prompt tokens that are read between two decoding steps.
        kv_cache_gib: memory for keys and values.
        fits_threads: True if the size of the model decides whether torch uses several CPU threads.
    """

    def __init__(
        self,
        model: Model,
        values: LoadedValues,
        *,
        max_batch: int,
        prefill_tokens: int,
        kv_cache_gib: float,
        fits_threads: bool,
    ) -> None:
        super().__init__(name="scheduler", daemon=True)
        self._model = model
        self._values = values
        self._max_batch = max_batch
        self._prefill_tokens = prefill_tokens
        self._cache_bytes = kv_cache_gib * 2**30
        self._fits_threads = fits_threads
        # None wakes the thread.
        self._inbox: queue.SimpleQueue[Job | AnyQuestion | None] = queue.SimpleQueue()
        self._outbox = Outbox()
        self._stopping = False
        self._ended = False
        # All jobs with a caller: those that wait, those that are prefilled and those in the batch.
        self._jobs: set[Job] = set()
        self._questions = QuestionQueue(model)
        self._waiting: deque[Job] = deque()
        # Prefilled jobs with candidates that have not joined the batch.
        self._ready: deque[Job] = deque()
        self._batch = RowBatch()

    @property
    def capacity(self) -> int:
        """Return the cells of the cache, rows x columns. Keys and values of value LMs count too."""
        return int(self._cache_bytes / (self._model.cell_bytes + self._values.cell_bytes))

    def submit(self, job: Job | AnyQuestion) -> None:
        """Queue a job or a question; from any thread.

        Raises:
            Unavailable: the thread has ended or is about to.
        """
        self._inbox.put(job)
        if self._ended:
            raise Unavailable("the engine was shut down")

    def submit_later(self, job: Job) -> None:
        """Queue a job whose caller has gone on; a thread that has ended fails its stream."""
        try:
            self.submit(job)
        except Unavailable as error:
            job.stream.put(error)

    def stop(self) -> None:
        """End the thread after the current step, and every job with an error."""
        self._stopping = True
        self._inbox.put(None)
        self.join()

    def run(self) -> None:
        """Step until stopped, then end what is left with an error."""
        if self._fits_threads:
            compute_alone([self._model.lm])
        with torch.inference_mode():
            while not self._stopping:
                self._receive()
                self._step()
                self._outbox.publish()
        self._ended = True
        # `_receive` waits while there is nothing to do; this entry ends the wait.
        self._inbox.put(None)
        self._receive()
        closed = Unavailable("the engine was shut down")
        self._outbox.fail(self._jobs, closed)
        self._outbox.publish()
        self._questions.fail(closed)

    def _receive(self) -> None:
        """Take what was submitted; wait for it if there is nothing else to do."""
        idle = not self._jobs and not self._questions
        while idle or not self._inbox.empty():
            job = self._inbox.get()
            idle = False
            if isinstance(job, AnyQuestion):
                self._questions.add(job)
            elif job is not None:
                self._jobs.add(job)
                self._waiting.append(job)
                for i, seed in enumerate(job.draw.seeds):
                    special = job.tools is not None and job.tools.has_special_marker
                    text = TextStream(
                        self._model.tokenizer,
                        job.params.stop,
                        special=special,
                        prompt=job.prompt.continued_ids,
                    )
                    job.rows.append(Row(job, i, seed, text, self._model.eos))

    def _step(self) -> None:
        self._remove_ended()
        self._questions.read(self._prefill_tokens, max(1, self.capacity // SHARE_OF_CACHE))
        self._prefill()
        self._join()
        self._decode()

    def _remove_ended(self) -> None:
        """Finish the candidates that were stopped, and drop the jobs whose callers have left."""
        for jobs in (self._waiting, self._ready):
            for job in list(jobs):
                stopped = [row for row in job.rows if job.is_stopped(row.index)]
                for row in stopped:
                    job.rows.remove(row)
                    self._outbox.add(job, row.finish())
                if job.closed or not job.rows:
                    jobs.remove(job)
        running: list[int] = []
        for i, row in enumerate(self._batch.rows):
            if row.finish_reason is None and row.job.is_stopped(row.index):
                self._outbox.add(row.job, row.finish())
            if row.finish_reason is None and not row.job.closed:
                running.append(i)
        self._batch = self._batch.take(running)
        self._jobs = {job for job in self._jobs if job.unfinished and not job.closed}

    def _prefill(self) -> None:
        """Read several short prompts at once, or the next part of a long one."""
        full = _lanes(self._batch.rows) >= self._max_batch
        if not self._waiting or full or self._is_ahead([]):
            return
        first = self._waiting[0].unread[0]
        if first.cache.length or len(first.ids) > self._prefill_tokens:
            self._prefill_part(self._waiting[0], first)
        else:
            self._prefill_together()

    def _prefill_part(self, job: Job, context: Context) -> None:
        ids = context.ids
        start = context.cache.length
        end = min(start + self._prefill_tokens, len(ids))
        with self._outbox.failing([job]):
            step = self._model.read([ids[start:end]], context.cache, [end])
            if end == len(ids):
                context.step = step
                self._finish_prefill([job])

    def _prefill_together(self) -> None:
        jobs, contexts = self._next_prefill()
        prompts = [context.ids for context in contexts]
        cache = RowCache()
        with self._outbox.failing(jobs):
            step = self._model.read(prompts, cache, [len(ids) for ids in prompts])
            for i, context in enumerate(contexts):
                context.cache = cache.take([i], len(context.ids))
                context.step = step.take([i])
            self._finish_prefill(jobs)

    def _next_prefill(self) -> tuple[list[Job], list[Context]]:
        """Return the contexts that the next forward pass reads together, with their jobs."""
        jobs: list[Job] = []
        contexts: list[Context] = []
        for job in self._waiting:
            if self._is_ahead(jobs):
                break
            for context in job.unread:
                if not self._fits_prefill([*contexts, context]):
                    return jobs, contexts
                contexts.append(context)
                if job not in jobs:
                    jobs.append(job)
        return jobs, contexts

    def _finish_prefill(self, jobs: list[Job]) -> None:
        """Let the jobs join the batch whose contexts are all read."""
        read = [job for job in jobs if not job.unread]
        for job in read:
            job.gather()
            job.value_caches = self._values.prefill(job.steering, job.prompt.ids)
        for job in read:
            self._waiting.remove(job)
        self._ready.extend(read)

    def _is_ahead(self, jobs: list[Job]) -> bool:
        """Return True if the prefilled prompts that wait for room take too much memory.

        The first one may have any size.
        """
        waiting = [*self._ready, *jobs][1:]
        tokens = sum(len(job.contexts) * job.longest_prompt for job in waiting)
        return tokens > self.capacity // SHARE_OF_CACHE

    def _fits_prefill(self, contexts: list[Context]) -> bool:
        longest = max(len(context.ids) for context in contexts)
        return len(contexts) * longest <= self._prefill_tokens

    def _join(self) -> None:
        """Let prefilled candidates join the batch.

        The jobs take turns, so that a large request does not hold up a small one.
        """
        joining: list[Row] = []
        while self._ready and self._fits([*self._batch.rows, *joining, self._ready[0].rows[0]]):
            job = self._ready.popleft()
            joining.append(job.rows.popleft())
            if job.rows:
                self._ready.append(job)
        if not joining:
            return
        with self._outbox.failing(row.job for row in joining):
            batch, step = _prefilled_batch(joining)
            self._batch = self._batch.join(self._advance(batch, step))

    def _fits(self, rows: list[Row]) -> bool:
        widest = max(row.job.width for row in rows)
        lanes = _lanes(rows)
        return lanes <= self._max_batch and lanes * widest <= self.capacity

    def _decode(self) -> None:
        """Sample the next token of every row of the batch."""
        rows = self._batch.rows
        if not rows:
            return
        with self._outbox.failing(row.job for row in rows):
            batch = self._batch
            step = self._model.read(batch.newest, batch.cache, batch.lengths)
            self._batch = self._advance(batch, step)

    def _advance(self, batch: RowBatch, step: Step) -> RowBatch:
        """Turn the logits of all lanes into tokens; return the rows that continue."""
        batch, step, contexts = self._drop_broken(batch, step)
        rows = batch.rows
        if not rows:
            return batch
        # Penalties, biases and bans.
        logits = adjust(step.logits, rows)
        logits = self._guide(batch, logits, contexts)
        # Kept until rows join or leave.
        if batch.steering is None:
            batch.steering = self._values.steering_batch(rows)
        drawn = draw_tokens(logits, step.hidden, rows, batch.steering, batch.value_caches)
        self._report_estimates(rows, drawn.steered, step.hidden)
        tokens = drawn.tokens
        if drawn.candidates is not None:
            keep_sampled_siblings(batch.value_caches.values(), tokens)
        entries = self._entries(rows, step.logits, drawn.steered, tokens)
        running: list[int] = []
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            self._outbox.add(row.job, row.accept(token, entries.get(i)))
            if row.finish_reason is None:
                running.append(i)
        return batch.take(running)

    def _drop_broken(self, batch: RowBatch, step: Step) -> tuple[RowBatch, Step, torch.Tensor]:
        """Constrain the candidates, and fail those without a largest logit that is finite.

        Returns:
            The other candidates, their own results and the logits of all their lanes.
        """
        contexts = step.logits
        is_guided = batch.is_guided
        if is_guided:
            step = step.take(batch.first_lanes())
        # The forbidden tokens of structured outputs.
        step = step._replace(logits=constrain(step.logits, batch.rows))
        finite = step.logits.amax(dim=-1).isfinite().tolist()
        if is_guided:
            of_lanes = contexts.amax(dim=-1).isfinite().tolist()
            pairs = zip(finite, batch.split(of_lanes), strict=True)
            finite = [first and all(lanes) for first, lanes in pairs]
        if all(finite):
            return batch, step, contexts
        sound: list[int] = []
        for i, row in enumerate(batch.rows):
            if finite[i]:
                sound.append(i)
            else:
                self._outbox.add(row.job, row.fail())
        return batch.take(sound), step.take(sound), contexts[batch.lanes(sound)]

    def _guide(self, batch: RowBatch, logits: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
        """Guide the candidates' logits by those of their contexts."""
        if not batch.is_guided:
            return logits
        # Kept until rows join or leave.
        if batch.guidance is None:
            batch.guidance = batch.guidance_batch(logits.device)
        return guide_rows(logits, contexts, batch.guidance)

    def _report_estimates(
        self, rows: Sequence[Row], logits: torch.Tensor, hidden: torch.Tensor
    ) -> None:
        """Report the value estimates of the rows that are due."""
        due = [i for i, row in enumerate(rows) if row.is_due]
        if not due:
            return
        weights = [rows[i].job.estimates for i in due]
        values = expected_values(logits[due], hidden[due], weights).tolist()
        for i, value in zip(due, values, strict=True):
            row = rows[i]
            self._outbox.add(row.job, [Estimate(row.index, len(row.tokens), value)])

    def _entries(
        self, rows: Sequence[Row], logits: torch.Tensor, steered: torch.Tensor, tokens: list[int]
    ) -> dict[int, Entry]:
        """Return the logprob entries of the rows that report logprobs, by row."""
        requested: dict[int, int] = {}
        for i, row in enumerate(rows):
            if row.params.logprobs is not None:
                requested[i] = row.params.logprobs
        steered_rows = frozenset(i for i in requested if rows[i].is_aligned)
        return logprob_entries(self._model, logits, steered, tokens, requested, steered_rows)


def _prefilled_batch(rows: Iterable[Row]) -> tuple[RowBatch, Step]:
    """Make a batch of candidates with the keys, values and logits of their jobs' prompts."""
    by_job: dict[Job, list[Row]] = {}
    for row in rows:
        by_job.setdefault(row.job, []).append(row)
    batch = RowBatch()
    for job, of_job in by_job.items():
        batch = batch.join(RowBatch.of_prompt(job, of_job))
    steps = [row.job.step for row in batch.rows if row.job.step is not None]
    return batch, Step.stack(steps)


def _lanes(rows: Iterable[Row]) -> int:
    """Return the number of rows of the cache that these candidates take."""
    return sum(row.lanes for row in rows)
