"""What one request takes from its caller's budget of tokens: its worst case, until it is known better."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from infer_align.errors import DeadlineExceeded
from infer_align.flow.run import OnDelta
from infer_align.types import Delta, Response
from infer_align_server.limits.rate_limit import RateLimit


class Charge:
    """One request's place in its caller's token budget: what it has spent as far as anybody knows."""

    def __init__(self, worst_case: int, *, limited: bool) -> None:
        self._worst_case = worst_case
        self._limited = limited
        self._pieces = 0
        self.spent = 0

    def metered(self, on_delta: OnDelta | None) -> OnDelta | None:
        """Sampling begins: from here on the worst case counts, until something better is known."""
        if not self._limited:
            return on_delta
        self.spent = self._worst_case
        if on_delta is None:  # a budget is no reason to ask the engine for every token by itself
            return None

        def count(delta: Delta) -> None:
            self._pieces += 1
            on_delta(delta)

        return count

    def answered(self, response: Response) -> None:
        """It ended well: what was sampled is known."""
        sampled = sum(candidate.completion_tokens for candidate in response.candidates)
        self.spent = sampled + response.scores.spent.judge_completion_tokens

    def broken_off(self, *, by_client: bool) -> None:
        """It did not: what the engine showed was spent. A client that leaves an engine that shows nothing pays in full, and so does
        one whose own deadline leaves nothing.

        Otherwise reading a stream to its last token but one, and hanging up, would cost nothing.
        """
        if self._pieces or not by_client:
            self.spent = min(self.spent, self._pieces)


@contextmanager
def charged(allowance: RateLimit, caller: str, worst_case: int) -> Iterator[Charge]:
    """Take the worst case while the block runs; afterwards give back what was not spent, or take what was spent beyond it.

    Raises:
        Overloaded: the caller's budget does not hold it.
    """
    allowance.take(caller, worst_case)
    charge = Charge(worst_case, limited=allowance.limited)
    try:
        yield charge
    except BaseException as error:
        charge.broken_off(
            by_client=isinstance(error, DeadlineExceeded) or not isinstance(error, Exception)
        )
        raise
    finally:
        allowance.give_back(caller, worst_case - charge.spent)
