"""TrustJudge: a judge as a reward, read from the probabilities of its labels instead of the label it happens to say.

"TrustJudge" (2509.21117). This is what a request may ask for; the judge itself stands in `infer_align.rewards.trust_judge`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

from annotated_types import Len
from pydantic import AfterValidator, Field

from infer_align.types import Capability, Plan, Stage

CRITERIA = "helpful, correct and clear"

Mode = Literal["score", "pairwise"]
Scale = Literal[5, 10, 100]
Readout = Literal["expected", "geval", "published"]


def _said(text: str) -> str:
    if not text.strip():
        raise ValueError("words; leave it out for the judge's own criteria")
    return text


Criteria = Annotated[
    str, Len(max_length=4000), AfterValidator(_said), Field(json_schema_extra={"pattern": r"\S"})
]


@dataclass(frozen=True, slots=True)
class TrustJudge:
    """Let a judge score or compare the candidates, beside the rewards; what is left out is as the judge is configured."""

    mode: Mode | None = field(
        default=None,
        metadata={
            "description": "one score per candidate, or comparisons in both orders and their win rates"
        },
    )
    scale: Scale | None = field(
        default=None, metadata={"description": "the highest score that the judge may give"}
    )
    criteria: Criteria | None = field(
        default=None, metadata={"description": "what is judged, in words"}
    )
    weight: float = field(
        default=1.0,
        metadata={
            "ge": 0,
            "le": 1e9,
            "description": "beside the weights of the rewards; the judge's scores are from 1 to 5",
        },
    )
    readout: Readout | None = field(
        default=None,
        metadata={
            "description": "expectation over the labels; that, not renormalised; or the paper's code with its defects"
        },
    )

    stage: ClassVar[Stage] = Stage.SCORE
    needs: ClassVar[frozenset[Capability]] = (
        frozenset()
    )  # of the judge's engine, not of the one that answers

    def plan(self, plan: Plan) -> Plan:
        """The judge among the plan's rewards, asked in this way."""
        return replace(
            plan,
            rewards={**plan.rewards, "trust_judge": self.weight},
            parameters={**plan.parameters, "trust_judge": self},
        )


plugin = TrustJudge
