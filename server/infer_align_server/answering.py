"""Carry out the plans of one request: admission, the charge of its caller, and its metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from time import monotonic

from infer_align.errors import AlignError, DeadlineExceeded, EngineFailed
from infer_align.flow.plan import Plan
from infer_align.flow.propose import OnDelta, OnFinished, call_both
from infer_align.flow.response import Response
from infer_align.flow.run import align
from infer_align.flow.selection import NothingScored
from infer_align.types import Candidate, Delta
from infer_align_server.limits.client_timeout import shorten_deadline
from infer_align_server.limits.token_budget import Charge, charged_as_one
from infer_align_server.logs import describe_usage
from infer_align_server.service import Service
from infer_align_server.telemetry import following


async def answer_all(
    service: Service,
    plans: Sequence[Plan],
    on_delta: OnDelta | None = None,
    caller: str = "",
    on_candidate: OnFinished | None = None,
) -> list[Response]:
    """Wait for admission, then carry out the plans of one request side by side.

    The request is admitted as one, with the sum of its worst cases. If one plan fails, the others
    are cancelled.

    Args:
        service: The service.
        plans: One plan per prompt.
        on_delta: Called with each delta of the engine. Its index is the one of the choice in the
            response to the whole request.
        caller: The name of the caller, which pays; see `Service.authorize`.
        on_candidate: Called with each candidate that is finished.

    Returns:
        One response per plan, in their order.

    Raises:
        Overloaded: The queue is full, or the caller's token budget is used up.
        AlignError: See `infer_align.flow.run.align`.
    """
    arrival_time = monotonic()
    worst_case = sum(plan.worst_case_tokens for plan in plans)
    deadline_seconds = plans[0].deadline_seconds
    work: list[_Work] = []
    charges: list[Charge] = []
    limited = service.tokens.limited
    for i, plan in enumerate(plans):
        charge = Charge(plan.worst_case_tokens, limited=limited, context_cost=plan.context_cost)
        first_choice = i * plan.n_returned
        work.append(_Work(service, plan, charge, _shifted(on_delta, first_choice), on_candidate))
        charges.append(charge)
    async with (
        charged_as_one(service.tokens, caller, charges),
        service.admission.admit(worst_case, deadline_seconds, caller),
    ):
        waited_seconds = monotonic() - arrival_time
        responses = await _run_all(work, waited_seconds)
    for response in responses:
        _check_returned(service, response)
    candidates: list[Candidate] = []
    prompt_tokens = 0
    for response in responses:
        service.metrics.count_response(response)
        candidates += response.candidates
        prompt_tokens += response.prompt_tokens
    describe_usage(candidates, prompt_tokens)
    return responses


class _Work:
    """The work for one plan of an admitted request."""

    def __init__(
        self,
        service: Service,
        plan: Plan,
        charge: Charge,
        on_delta: OnDelta | None,
        on_candidate: OnFinished | None,
    ) -> None:
        self._service = service
        self._plan = plan
        self._charge = charge
        self._on_delta = on_delta
        self._on_candidate = on_candidate

    async def run(self, waited_seconds: float) -> Response:
        """Carry out the plan and charge its tokens."""
        plan = shorten_deadline(self._plan, waited_seconds)
        with following(plan) as trace:
            if trace is None:
                return await self._run(plan, self._on_candidate)
            on_candidate = call_both(trace.candidate_finished, self._on_candidate)
            try:
                response = await self._run(plan, on_candidate)
            except BaseException as error:
                trace.fail(error)
                raise
            trace.complete(response)
            return response

    async def _run(self, plan: Plan, on_candidate: OnFinished | None) -> Response:
        try:
            on_delta = self._charge.start(self._on_delta)
            response = await align(plan, self._service.engine, on_delta, on_candidate)
        except NothingScored as error:
            self._charge.fail(error.candidates, error.scores)
            self._service.metrics.count_failure(error.candidates, error.scores)
            describe_usage(error.candidates)
            raise
        self._charge.complete(response)
        return response


async def _run_all(work: Sequence[_Work], waited_seconds: float) -> list[Response]:
    if len(work) == 1:
        return [await work[0].run(waited_seconds)]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each.run(waited_seconds)) for each in work]
    except ExceptionGroup as failures:
        # The client gets one error: the first.
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _shifted(on_delta: OnDelta | None, first_choice: int) -> OnDelta | None:
    """Return a function that adds the index of the first choice to that of each delta."""
    if on_delta is None or first_choice == 0:
        return on_delta

    def shift(delta: Delta) -> None:
        on_delta(replace(delta, index=first_choice + delta.index))

    return shift


def _check_returned(service: Service, response: Response) -> None:
    """Refuse a response that lacks an answer.

    Without a selection every candidate must be returned: fewer choices than n would be an error
    that the client does not see.

    Raises:
        AlignError: A candidate failed that is to be returned.
    """
    if response.plan.selects:
        return
    for candidate in response.candidates:
        if candidate.error:
            service.metrics.count_failure(response.candidates, response.scores)
            describe_usage(response.candidates)
            raise _candidate_error(candidate)


def _candidate_error(candidate: Candidate) -> AlignError:
    message = f"candidate {candidate.index} failed: {candidate.error}"
    if candidate.interrupted:
        return DeadlineExceeded(f"{message}; allow more time.")
    return EngineFailed(message, status=candidate.status, retry_after=candidate.retry_after)
