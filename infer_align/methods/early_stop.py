"""Early stopping of losers: candidates that value estimates give the least hope are not drawn to the end.

Best-of-n draws n answers to the end and keeps one. "Fast Best-of-N Decoding via Speculative Rejection" (2410.20290) scores partial
answers by the reward and stops the worst; here a value says what an answer will be worth, at no forward pass of its own, and the
field is cut as in successive halving: after `after` tokens, then twice, four times, ... as many, the share `keep` goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

from annotated_types import Ge, Le

from infer_align.errors import InvalidRequest
from infer_align.types import Capability, EstimateSchedule, Plan, Stage


@dataclass(frozen=True, slots=True)
class EarlyStop:
    """Stop drawing the candidates that value estimates give the least hope."""

    values: dict[str, Annotated[float, Ge(-1000), Le(1000)]] = field(
        metadata={
            "min_length": 1,
            "description": "{value name: weight}: whose estimates are compared; of kind head",
        }
    )
    after: int = field(
        default=16,
        metadata={
            "ge": 1,
            "description": "tokens after which candidates are compared; again at twice as many, and so on",
        },
    )
    keep: float = field(
        default=0.5,
        metadata={
            "gt": 0,
            "le": 1,
            "description": "share of those compared that is drawn on, rounded up",
        },
    )

    stage: ClassVar[Stage] = Stage.STEER
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.ESTIMATES})

    def plan(self, plan: Plan) -> Plan:
        """Every draw watched.

        Raises:
            InvalidRequest: there are no candidates to choose from.
        """
        if not plan.selects:
            raise InvalidRequest(
                "align.early_stop: needs candidates to choose from; give align.best_of_n or align.rps too.",
                param="align.early_stop",
            )
        watch = EstimateSchedule(self.values, self.after)
        return replace(
            plan,
            draws=tuple(replace(draw, estimates=watch) for draw in plan.draws),
            survival=self.keep,
        )


plugin = EarlyStop
