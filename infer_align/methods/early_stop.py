"""Early stopping: stop the candidates with the lowest value estimates.

Best-of-n draws n answers to their end and returns one. "Fast Best-of-N Decoding via Speculative
Rejection" (2410.20290) scores partial answers with the reward model and stops the worst. Here a
value head estimates what an answer will be worth, without a forward pass of its own. The candidates
are cut as in successive halving: after `after` tokens, and again after twice, four times, ... as
many, the fraction `keep` continues.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

from annotated_types import Ge, Le

from infer_align.errors import InvalidRequest
from infer_align.methods import MAX_VALUE_WEIGHT, Observer, PlanDraft, Stage
from infer_align.steering import EstimateSchedule
from infer_align.types import Candidate, Capability, Estimate, Event


@dataclass(frozen=True, slots=True)
class EarlyStop:
    """Stop the candidates with the lowest value estimates."""

    values: dict[str, Annotated[float, Ge(-MAX_VALUE_WEIGHT), Le(MAX_VALUE_WEIGHT)]] = field(
        metadata={
            "min_length": 1,
            "json_schema_extra": {
                "x-names": "estimates",
                "examples": [{"helpful": 1.0}],
                "x-slider": {"minimum": -2, "maximum": 2, "step": 0.1},
            },
            "description": "{value name: weight}: the values, of kind head, whose weighted "
            "estimates are compared.",
        }
    )
    after: int = field(
        default=16,
        metadata={
            "ge": 1,
            "description": "Tokens until the first comparison; each later one comes after twice as "
            "many.",
        },
    )
    keep: float = field(
        default=0.5,
        metadata={
            "gt": 0,
            "le": 1,
            "description": "Fraction of candidates that continue after each comparison, rounded "
            "up.",
        },
    )

    stage: ClassVar[Stage] = Stage.OBSERVE
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.ESTIMATES})
    relies_on: ClassVar[str] = "values"

    @property
    def value_names(self) -> tuple[str, ...]:
        """Return the names of the values whose estimates are compared."""
        return tuple(self.values)

    def apply(self, draft: PlanDraft) -> PlanDraft:
        """Ask for estimates of every draw, and compare them while candidates run.

        Raises:
            InvalidRequest: the plan has no candidates to choose from.
        """
        if not draft.selects:
            param = draft.param("early_stop")
            raise InvalidRequest(
                f"{param}: needs candidates to choose from; give {draft.param('best_of_n')} or "
                f"{draft.param('rps')} too.",
                param=param,
            )
        schedule = EstimateSchedule(self.values, self.after)
        draws = tuple(replace(draw, estimates=schedule) for draw in draft.draws)
        return replace(draft, draws=draws, observers=(*draft.observers, self.observer))

    def observer(self, candidates: int, n_returned: int) -> Halving:
        """Return the observer of one request."""
        return Halving(candidates, self.keep, n_returned)


plugin = EarlyStop


class Halving(Observer):
    """Compares the running candidates of one request, and rejects the lowest estimates.

    Candidates are compared at a checkpoint when each of them has reached it or has finished. The
    outcome depends only on the estimates, never on timing: a candidate that lost is rejected even
    if it has finished since.
    """

    def __init__(self, candidates: int, keep: float, n_returned: int) -> None:
        """Compare `candidates`, keep the fraction `keep`, and at least `n_returned` of them."""
        self._keep = keep
        self._n_returned = n_returned
        self._running = set(range(candidates))
        self._rejected: set[int] = set()
        self._last_checkpoint = 0  # in tokens
        # checkpoint in tokens -> candidate -> its estimate there
        self._estimates: dict[int, dict[int, float]] = {}

    def observe(self, event: Event) -> Mapping[int, str]:
        """Return the candidates that lose by this event."""
        if isinstance(event, Candidate):
            self._running.discard(event.index)
        elif isinstance(event, Estimate):
            self._record(event)
        return self._compare()

    def _record(self, estimate: Estimate) -> None:
        if estimate.index in self._rejected or estimate.tokens <= self._last_checkpoint:
            return
        # Four digits: answers that begin alike count as equal, although a batch of another size
        # changes the last digits.
        value = float(f"{estimate.value:.4g}")
        self._estimates.setdefault(estimate.tokens, {})[estimate.index] = value

    def _compare(self) -> dict[int, str]:
        """Compare at every checkpoint that all running candidates have reached."""
        rejected: dict[int, str] = {}
        for checkpoint in sorted(self._estimates):
            if not self._running <= self._estimates[checkpoint].keys():
                break
            self._last_checkpoint = checkpoint
            rejected |= self._reject(checkpoint, self._estimates.pop(checkpoint))
        return rejected

    def _reject(self, checkpoint: int, estimates: Mapping[int, float]) -> dict[int, str]:
        # A candidate whose estimate is not a number neither wins nor loses.
        valid = {i: value for i, value in estimates.items() if not math.isnan(value)}
        ranking = sorted(valid, key=lambda i: (-valid[i], i))
        survivors = max(self._n_returned, math.ceil(self._keep * len(ranking)))
        rejected = {}
        for i in ranking[survivors:]:
            rejected[i] = (
                f"stopped early: after {checkpoint} tokens, estimate {valid[i]:.3g}, below the "
                f"best {survivors} of {len(ranking)}"
            )
            for later in self._estimates.values():
                later.pop(i, None)
        self._rejected |= rejected.keys()
        self._running -= rejected.keys()
        return rejected
