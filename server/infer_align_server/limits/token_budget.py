"""The charge of a request to its caller's token budget.

The worst case is charged when the request starts. When the request ends, the difference to the
tokens that were spent is returned: generated, sampled by judges, read in the contexts of guidance,
and read by engines for rewards.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from infer_align.errors import DeadlineExceeded
from infer_align.flow.cost import ContextCost
from infer_align.flow.propose import OnDelta
from infer_align.flow.response import Response, context_tokens
from infer_align.types import Candidate, Delta, Scores
from infer_align_server.limits.rate_limit import RateLimit

NO_CONTEXTS = ContextCost()


class Charge:
    """The charge of one request, or of one prompt of it.

    Attributes:
        worst_case: The largest number of tokens that it can spend.
        spent: The tokens to charge, as far as they are known.
    """

    def __init__(
        self, worst_case: int, *, limited: bool, context_cost: ContextCost = NO_CONTEXTS
    ) -> None:
        self.worst_case = worst_case
        self._context_cost = context_cost
        self._limited = limited
        self._streamed = 0
        self._is_final = False
        self.spent = 0

    def start(self, on_delta: OnDelta | None) -> OnDelta | None:
        """Charge the worst case from now on; call it when the engine starts.

        Returns:
            `on_delta`, extended to count the deltas.
        """
        if not self._limited:
            return on_delta
        self.spent = self.worst_case
        if on_delta is None:
            # Do not make the engine stream only to count.
            return None

        def count(delta: Delta) -> None:
            self._streamed += 1
            on_delta(delta)

        return count

    def complete(self, response: Response) -> None:
        """Charge the tokens of a complete response."""
        self._count(response.candidates, response.scores)

    def fail(self, candidates: Sequence[Candidate], scores: Scores) -> None:
        """Charge the tokens of a request that failed after its candidates were drawn."""
        self._count(candidates, scores)

    def _count(self, candidates: Sequence[Candidate], scores: Scores) -> None:
        generated = sum(candidate.completion_tokens for candidate in candidates)
        usage = scores.usage
        read = context_tokens(candidates) + usage.engine_tokens
        self.spent = generated + usage.judge_completion_tokens + read
        self._is_final = True

    def abort(self, *, by_client: bool) -> None:
        """Charge a request that ended early.

        Charge the deltas that were streamed, also in each context of guidance. If there were none
        and the client ended the request, charge the worst case. Otherwise a client could read a
        stream except for its last token, close the connection and pay nothing.

        Args:
            by_client: The client left, or the deadline in its request passed.
        """
        if self._is_final:
            return
        if self._streamed or not by_client:
            read = self._context_cost.streamed(self._streamed)
            self.spent = min(self.spent, self._streamed + read)


@asynccontextmanager
async def charged(budget: RateLimit, caller: str, worst_case: int) -> AsyncIterator[Charge]:
    """Charge the worst case before the block, and correct the charge after it.

    Args:
        budget: The token budgets of all callers.
        caller: The name of the caller, which pays.
        worst_case: The largest number of tokens that the request can spend.

    Raises:
        Overloaded: The caller's budget does not hold the worst case.
        StorageFailed: The budget cannot be counted.
    """
    charge = Charge(worst_case, limited=budget.limited)
    async with charged_as_one(budget, caller, [charge]):
        yield charge


@asynccontextmanager
async def charged_as_one(
    budget: RateLimit, caller: str, charges: Sequence[Charge]
) -> AsyncIterator[None]:
    """Charge the worst cases of all parts of a request before the block, and correct it after it.

    The parts are reserved together. One after the other, two requests could each hold a part of
    the budget that the other one needs, and a request over a whole budget would never begin.

    Args:
        budget: The token budgets of all callers.
        caller: The name of the caller, which pays.
        charges: One charge for each part.

    Raises:
        Overloaded: The caller's budget does not hold the worst cases.
        StorageFailed: The budget cannot be counted.
    """
    worst_case = sum(charge.worst_case for charge in charges)
    give_back = await budget.reserve(caller, worst_case)
    try:
        yield
    except BaseException as error:
        # An exception that is not an Exception is the cancellation after the client left.
        by_client = isinstance(error, DeadlineExceeded) or not isinstance(error, Exception)
        for charge in charges:
            charge.abort(by_client=by_client)
        raise
    finally:
        give_back(worst_case - sum(charge.spent for charge in charges))
