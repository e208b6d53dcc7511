"""Score the candidates of a plan with its rewards, all rewards at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus
from time import monotonic
from typing import Any

import numpy as np

from infer_align.errors import AlignError, DeadlineExceeded
from infer_align.flow.answers import in_play, whole_answer
from infer_align.flow.plan import Plan
from infer_align.flow.scorers import Scorer
from infer_align.objectives import project
from infer_align.rewards import Reward, RewardScores, time_budget
from infer_align.stages import stage
from infer_align.types import Array, Candidate, Direction, Messages, Scores, ScoringUsage

log = logging.getLogger("infer_align")

# The sum of the probabilities that two candidates beat each other is 1 within this distance.
PROBABILITY_ACCURACY = 1e-6


class Scoring:
    """The scoring of one request.

    Pipelined rewards score each candidate as soon as it is finished, while others are still being
    drawn. If candidates come in batches, each call of `score` adds the scores of the new ones.
    Leaving the `async with` block cancels what still runs.
    """

    def __init__(self, plan: Plan, deadline: float | None = None) -> None:
        """Prepare the rewards of a plan; `deadline` is in seconds of the monotonic clock."""
        self._plan = plan
        self._deadline = deadline
        self._rewards = {scorer.reward_name: scorer.reward for scorer in plan.scorers}
        # pipelined reward -> candidate -> its running score
        self._running: dict[str, dict[int, asyncio.Task[RewardScores]]] = {}
        # The candidates that were compared at the last call, by their index.
        self._compared: list[int] = []
        # reward -> its scores of these candidates
        self._results: dict[str, RewardScores] = {}
        # reward -> seconds of its slowest call
        self._seconds: dict[str, float] = {}
        # reward -> failures that the log has
        self._logged: dict[str, int] = {}

    async def __aenter__(self) -> Scoring:
        return self

    async def __aexit__(self, *_: object) -> None:
        for tasks in self._running.values():
            for task in tasks.values():
                task.cancel()

    def candidate_finished(self, candidate: Candidate) -> None:
        """Start the pipelined rewards of a candidate."""
        if candidate.error is not None:
            return
        for name, reward in self._rewards.items():
            if reward.pipelined:
                task = asyncio.create_task(self._score(name, [candidate]))
                self._running.setdefault(name, {})[candidate.index] = task

    async def score(self, candidates: Sequence[Candidate]) -> Scores:
        """Score every candidate that can be compared. A score that fails or comes too late is NaN.

        Args:
            candidates: numbered from 0; those of the call before come first.
        """
        if not self._rewards:
            return Scores()
        eligible = in_play(self._plan, candidates)
        compared = [candidate.index for candidate in eligible]
        # Candidates without a word are out of play once another one has some.
        is_longer = compared[: len(self._compared)] == self._compared
        self._compared = compared
        pending = [self._score_all(name, eligible, anew=not is_longer) for name in self._rewards]
        self._results = dict(zip(self._rewards, await asyncio.gather(*pending), strict=True))
        scores = _combine(self._plan, self._results, eligible, len(candidates))
        for name, failed in scores.failures.items():
            self._log_failure(name, failed)
        return replace(scores, seconds=self._seconds)

    async def _score_all(
        self, name: str, candidates: Sequence[Candidate], *, anew: bool
    ) -> RewardScores:
        """Return the scores of all candidates; only new ones are scored, if that is enough."""
        earlier = self._results.get(name)
        if earlier is None:
            return await self._score_new(name, candidates)
        if anew:
            scores = await self._score_new(name, candidates)
            return replace(scores, usage=earlier.usage + scores.usage)
        new = candidates[earlier.values.shape[-1] :]
        if not new:
            return earlier
        reward = self._rewards[name]
        if reward.relative:
            return _replaced(earlier, await self._score_new(name, candidates))
        parts = (earlier, await self._score_new(name, new))
        return replace(_join(parts), report=reward.join_reports(parts))

    async def _score_new(self, name: str, candidates: Sequence[Candidate]) -> RewardScores:
        tasks = self._running.get(name)
        if tasks is None:
            return await self._score(name, candidates)
        running = [tasks[candidate.index] for candidate in candidates]
        return _join(await asyncio.gather(*running))

    async def _score(self, name: str, candidates: Sequence[Candidate]) -> RewardScores:
        answers = [whole_answer(self._plan, candidate) for candidate in candidates]
        start = monotonic()
        reward = self._rewards[name]
        with stage("reward", name) as fail:
            scores = await score_with(reward, self._plan.messages, answers, self._deadline)
            if scores.failure is not None:
                fail(type(scores.failure).__name__)
        self._seconds[name] = max(monotonic() - start, self._seconds.get(name, 0.0))
        return scores

    def _log_failure(self, name: str, failed: int) -> None:
        """Log the candidates that a reward could not score, once, with the first traceback."""
        new = failed - self._logged.get(name, 0)
        if new <= 0:
            return
        self._logged[name] = failed
        scores = self._results[name]
        notes = [note for note in scores.notes if note]
        reason = notes[0] if notes else "its scores are not numbers"
        fields = {"reward": name, "candidates": new, "reason": reason}
        log_failure("reward failed", fields, scores.failure)


def log_failure(event: str, fields: Mapping[str, Any], failure: BaseException | None) -> None:
    """Log a reward that did not score.

    A request may set a deadline that is too short for a reward, or hold a text that a reward cannot
    read. That is no fault of the server, so there is no traceback, and the level is lower.

    Args:
        event: the event.
        fields: the fields of its line.
        failure: what the reward raised; None if its scores are not numbers.
    """
    if isinstance(failure, DeadlineExceeded):
        log.info("%s: the deadline of the request passed", event, extra=fields)
    elif isinstance(failure, AlignError) and failure.status == HTTPStatus.BAD_REQUEST:
        log.warning(event, extra=fields)
    else:
        log.error(event, extra=fields, exc_info=failure)


async def score(
    plan: Plan, candidates: Sequence[Candidate], deadline: float | None = None
) -> Scores:
    """Score existing candidates with the rewards of a plan.

    Args:
        plan: the plan.
        candidates: numbered from 0.
        deadline: seconds of the monotonic clock at which scoring ends.
    """
    async with Scoring(plan, deadline) as scoring:
        return await scoring.score(candidates)


async def score_with(
    reward: Reward,
    messages: Messages,
    candidates: Sequence[Candidate],
    deadline: float | None = None,
) -> RewardScores:
    """Call one reward. Whatever goes wrong becomes NaN with a note, never an exception."""
    shape = (max(1, len(reward.attributes)), len(reward.members), len(candidates))
    seconds = reward.timeout_seconds
    if deadline is not None:
        seconds = min(seconds, deadline - monotonic())
    limit = asyncio.timeout(seconds)
    # The variable is local to this task.
    time_budget.set(seconds)
    try:
        async with limit:
            scores = await reward.score(messages, candidates)
        if scores.values.shape != shape:
            raise ValueError(f"the reward returned shape {scores.values.shape}, expected {shape}")
        if scores.matrix is not None:
            _check_win_probabilities(scores.matrix, len(candidates))
        # An infinite score cannot be compared, so it counts as not scored.
        finite = np.where(np.isfinite(scores.values), scores.values, np.nan)
        return replace(scores, values=finite)
    except TimeoutError as error:
        note = f"no score within {max(0.0, seconds):.3g} s"
        failure: Exception = error
        # The clock does not tell: event loops may run a timer half a millisecond early.
        if limit.expired() and seconds < reward.timeout_seconds:
            failure = DeadlineExceeded(note)
    except AlignError as error:
        note = error.message
        failure = error
    except Exception as error:
        # A reward is the user's code: whatever it raises is data, not a crash.
        note = f"{type(error).__name__}: {error}"
        failure = error
    notes = (note,) * len(candidates)
    return RewardScores(np.full(shape, np.nan), notes=notes, failure=failure)


def _check_win_probabilities(matrix: Array, n: int) -> None:
    if matrix.shape != (n, n):
        raise ValueError(
            f"the reward returned win probabilities of shape {matrix.shape}, expected {(n, n)}"
        )
    # The diagonal compares nothing, and NaN was not compared.
    rows, columns = np.triu_indices(n, 1)
    wins = matrix[rows, columns]
    losses = matrix[columns, rows]
    compared = ~np.isnan(wins) | ~np.isnan(losses)
    with np.errstate(invalid="ignore"):
        complete = np.abs(wins + losses - 1) < PROBABILITY_ACCURACY
    possible = complete & (wins >= 0) & (wins <= 1)
    if not possible[compared].all():
        raise ValueError(
            "the reward returned win probabilities that are not from 0 to 1 with p[i, j] + "
            "p[j, i] = 1"
        )


def _replaced(earlier: RewardScores, again: RewardScores) -> RewardScores:
    """Return new scores of all candidates; the earlier ones, if nothing was scored again."""
    if not np.isnan(again.values).all():
        return replace(again, usage=earlier.usage + again.usage)
    n = earlier.values.shape[-1]
    missing = replace(again, values=again.values[..., n:], notes=again.notes[n:])
    matrix = earlier.matrix
    if matrix is not None:
        total = again.values.shape[-1]
        matrix = np.full((total, total), np.nan)
        matrix[:n, :n] = earlier.matrix
    return replace(_join((earlier, missing)), report=earlier.report, matrix=matrix)


def _join(parts: Sequence[RewardScores]) -> RewardScores:
    """Join the scores of several calls into one."""
    usage = ScoringUsage()
    notes: list[str | None] = []
    failure: BaseException | None = None
    remark = ""
    for part in parts:
        usage += part.usage
        notes += part.notes or (None,) * part.values.shape[-1]
        if failure is None:
            failure = part.failure
        remark = remark or part.remark
    values = np.concatenate([part.values for part in parts], axis=-1)
    return RewardScores(values, usage, tuple(notes), failure=failure, remark=remark)


def _combine(
    plan: Plan,
    results: Mapping[str, RewardScores],
    eligible: Sequence[Candidate],
    candidates: int,
) -> Scores:
    """Bring the results of all rewards into one record, with NaN for candidates not scored."""
    indices = [candidate.index for candidate in eligible]
    members = {}
    notes = {}
    matrices = {}
    for scorer in plan.scorers:
        result = results[scorer.reward_name]
        values = np.full((len(scorer.reward.members), candidates), np.nan)
        values[:, indices] = _member_scores(scorer, result.values, plan.direction)
        members[scorer.name] = values
        notes[scorer.name] = _notes_by_index(result, indices, candidates)
        if result.matrix is not None:
            matrix = np.full((candidates, candidates), np.nan)
            matrix[np.ix_(indices, indices)] = result.matrix
            matrices[scorer.name] = matrix
    return _with_records(Scores(members, notes=notes, matrices=matrices), results)


def _notes_by_index(
    result: RewardScores, indices: Sequence[int], candidates: int
) -> tuple[str | None, ...]:
    """Return the note of each candidate; None for one without a note, or that was not scored."""
    notes: list[str | None] = [None] * candidates
    for index, note in zip(indices, result.notes, strict=False):
        notes[index] = note
    return tuple(notes)


def _with_records(scores: Scores, results: Mapping[str, RewardScores]) -> Scores:
    """Return the scores with the usage, report, failures and remark of each reward."""
    usage = ScoringUsage()
    reports: dict[str, Any] = {}
    failures: dict[str, int] = {}
    errors: dict[str, str] = {}
    remarks: dict[str, str] = {}
    for name, result in results.items():
        usage += result.usage
        if result.report:
            reports[name] = result.report
        failed = int(np.isnan(result.values).any(axis=(0, 1)).sum())
        if failed:
            failures[name] = failed
        if result.failure is not None:
            errors[name] = type(result.failure).__name__
        if result.remark:
            remarks[name] = result.remark
    return replace(
        scores, usage=usage, reports=reports, failures=failures, errors=errors, remarks=remarks
    )


def _member_scores(scorer: Scorer, values: Array, direction: Direction | None) -> Array:
    """Reduce [A, K, N] scores to [K, N].

    Returns one attribute, the projection on the plan's direction, or the only score there is.
    """
    attributes = scorer.reward.attributes
    if scorer.attribute is not None:
        return np.asarray(values[attributes.index(scorer.attribute)])
    if attributes and direction:
        return project(direction, values, attributes)
    return np.asarray(values[0])
