"""The logprobs of a prompt that a text completion echoes."""

from __future__ import annotations

import asyncio

from infer_align.engines.transformers.choices import Entry, prompt_entries
from infer_align.engines.transformers.model import Model
from infer_align.engines.transformers.rows import Job
from infer_align.engines.transformers.scheduler import Scheduler
from infer_align.engines.transformers.sequences import SequenceQuestion
from infer_align.errors import AlignError


def lists_prompt(job: Job) -> bool:
    """Return True if the request wants the logprobs of its prompt."""
    return job.params.echo and job.params.logprobs is not None


def start_reading(model: Model, scheduler: Scheduler, job: Job) -> asyncio.Task[None]:
    """Return a task that reads the logprobs of a job's prompt, then submits the job.

    A failure ends the job's stream.
    """
    return job.loop.create_task(_submit_with_prompt(model, scheduler, job))


async def _submit_with_prompt(model: Model, scheduler: Scheduler, job: Job) -> None:
    try:
        job.entries = await _read(model, scheduler, job.prompt.ids)
        if not job.closed:
            scheduler.submit(job)
    except AlignError as error:
        job.stream.put(error)


async def _read(model: Model, scheduler: Scheduler, ids: list[int]) -> list[Entry]:
    # The first token follows nothing, so the other ones are the text after it.
    question = SequenceQuestion(ids[:1], [ids[1:]])
    scheduler.submit(question)
    answer = await question.answer
    return prompt_entries(model, ids, answer.logprobs[0].tolist())
