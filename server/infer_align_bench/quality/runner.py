"""Answer every prompt under every setting, and score the answers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from infer_align.errors import AlignError
from infer_align_bench.answer import Answer, describe_error
from infer_align_bench.endpoint import Endpoint, error_of
from infer_align_bench.load import run_until_stopped
from infer_align_bench.quality.gold import Gold
from infer_align_bench.quality.grid import Cell
from infer_align_bench.quality.notebook import Notebook, ScoredAnswer
from infer_align_bench.types import ChatPrompt

# Distance between the seeds of one prompt's draws: larger than any number of prompts.
DRAW_STRIDE = 1_000_003
# Statuses of a wrong or too large request: a repetition would fail too.
REFUSAL_STATUSES = (400, 404, 413, 422)
# A setting without any answer is given up after refusals of this many prompts.
MAX_REFUSALS = 3
# The endpoint is given up after this many consecutive failures.
MAX_CONSECUTIVE_FAILURES = 20
SCORING_COUNTS = ("reward_tokens", "judge_prompt_tokens", "judge_completion_tokens")
ALIGN_IGNORED = (
    "the endpoint ignored `align`: its answer has no `align`, "
    "and would be counted as an aligned answer"
)


@dataclass(frozen=True, slots=True)
class Work:
    """One answer to measure."""

    cell: Cell
    prompt: int
    draw: int
    # Digest of the setting and the prompt.
    key: str


@dataclass(frozen=True, slots=True)
class Failure:
    """One answer that could not be measured."""

    prompt: int
    reason: str
    # True if a repetition would fail too.
    refused: bool


def plan_work(
    cells: Sequence[Cell], prompts: Sequence[ChatPrompt], draws: int, seed: int
) -> list[Work]:
    """List all answers to measure, prompt by prompt.

    The settings of each prompt are in random order, so that a slow phase of the machine affects
    all settings.
    """
    work = []
    for draw in range(draws):
        for i, prompt in enumerate(prompts):
            group = [Work(cell, i, draw, _digest(cell, prompt)) for cell in cells]
            generator = random.Random(f"{seed}/{draw}/{i}")  # noqa: S311 - an order, no secret
            generator.shuffle(group)
            work += group
    return work


def _digest(cell: Cell, prompt: ChatPrompt) -> str:
    request = [cell.align, cell.body, prompt.messages, prompt.body]
    text = json.dumps(request, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Runner:
    """Measures the answers that a notebook does not have yet."""

    def __init__(
        self, endpoint: Endpoint, gold: Gold, prompts: Sequence[ChatPrompt], notebook: Notebook
    ) -> None:
        self.endpoint = endpoint
        # Failures of each setting.
        self.failures: dict[str, list[Failure]] = {}
        # True if the endpoint was given up.
        self.lost = False
        self._gold = gold
        self._prompts = prompts
        self._notebook = notebook
        self._answered = Counter(row.cell for row in notebook.rows.values())
        self._consecutive_failures = 0

    @property
    def refused(self) -> dict[str, str]:
        """Return the reasons of the settings that were refused for every prompt, by setting."""
        reasons = {}
        for name, failures in self.failures.items():
            if not self._answered[name] and all(failure.refused for failure in failures):
                reasons[name] = failures[0].reason
        return reasons

    async def run(
        self,
        work: Sequence[Work],
        concurrency: int,
        stop: asyncio.Event,
        on_progress: Callable[[], None],
    ) -> bool:
        """Measure the work that is not in the notebook.

        Args:
            work: all answers to measure.
            concurrency: number of requests in flight.
            stop: ends the measurement early when it is set.
            on_progress: called for each finished piece of work.

        Returns:
            True if the measurement was stopped.
        """
        rows = self._notebook.rows
        remaining = iter([item for item in work if (item.key, item.draw) not in rows])

        async def worker() -> None:
            for item in remaining:
                if self._consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
                    self.lost = True
                    return
                if not self._given_up(item.cell.name):
                    await self._measure(item)
                on_progress()

        async def workers() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(worker())

        return not await run_until_stopped(stop, workers())

    def _given_up(self, name: str) -> bool:
        """Return True if a setting was refused often enough to skip its other prompts."""
        prompts = {failure.prompt for failure in self.failures.get(name, ()) if failure.refused}
        return len(prompts) >= MAX_REFUSALS and name in self.refused

    async def _measure(self, work: Work) -> None:
        try:
            row = await self._answer(work)
        except AlignError as error:
            self._add_failure(work, error.message)
            return
        if row is not None:
            self._consecutive_failures = 0
            self._answered[work.cell.name] += 1
            self._notebook.add(row)

    def _add_failure(self, work: Work, reason: str, *, refused: bool = False) -> None:
        self._consecutive_failures = 0 if refused else self._consecutive_failures + 1
        failure = Failure(work.prompt, self.endpoint.redact(reason), refused)
        self.failures.setdefault(work.cell.name, []).append(failure)

    async def _answer(self, work: Work) -> ScoredAnswer | None:
        """Request and score one answer; return None after a failure of the endpoint."""
        prompt = self._prompts[work.prompt]
        started = perf_counter()
        status, body = await self.endpoint.call("chat/completions", self._body(work, prompt))
        seconds = perf_counter() - started
        text = _text(body)
        if status != 200 or text is None:
            reason = ": ".join(describe_error(error_of(body), f"status {status}"))
            self._add_failure(work, reason, refused=status in REFUSAL_STATUSES)
            return None
        if _ignored_align(work.cell, body):
            self._add_failure(work, ALIGN_IGNORED, refused=True)
            return None
        answer = Answer()
        answer.read_body(body)
        prompt_tokens, generated, returned = answer.tokens()
        usage = answer.align_usage()
        score = await self._gold(prompt.messages, text)
        return ScoredAnswer(
            key=work.key,
            cell=work.cell.name,
            prompt=work.prompt,
            draw=work.draw,
            text=text,
            gold=score if math.isfinite(score) else None,
            seconds=seconds,
            spent=generated,
            returned=returned,
            prompt_tokens=prompt_tokens,
            scoring=sum(usage.get(name, 0) for name in SCORING_COUNTS),
            kl=_log_ratio(body) if work.cell.is_steered else None,
        )

    def _body(self, work: Work, prompt: ChatPrompt) -> dict[str, Any]:
        body = self.endpoint.body(prompt, work.prompt + work.draw * DRAW_STRIDE)
        body |= work.cell.body
        if work.cell.align is not None:
            body["align"] = work.cell.align
        if work.cell.is_steered:
            # The log-probabilities under both policies, from which the KL is estimated.
            body.setdefault("logprobs", True)
        return body


def _ignored_align(cell: Cell, body: Mapping[str, Any]) -> bool:
    """Return True if the request had an `align` whose details should be in the answer."""
    if not cell.align or cell.align.get("details") == "none":
        return False
    return "align" not in body


def _log_ratio(body: Any) -> float | None:
    """Return the sum over the tokens of log pi_steered - log pi_frozen, before temperature.

    None if the answer has no log-probabilities under both policies.
    """
    try:
        tokens = body["choices"][0]["logprobs"]["content"]
        return math.fsum(token["aligned_logprob"] - token["logprob"] for token in tokens)
    except (KeyError, IndexError, TypeError):
        return None


def _text(body: Any) -> str | None:
    """Return the text of an answer; None if the body is not an answer."""
    try:
        content = body["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    return content if isinstance(content, str) else ""
