"""TrustJudge: use a judge as a reward, read from the probabilities of its labels.

This file holds what a request may ask of the judge. The judge itself stands in
`infer_align.rewards.trust_judge`.

Source: "TrustJudge" (2509.21117).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal, TypeAlias

from annotated_types import Len
from pydantic import AfterValidator, Field

from infer_align.methods import PlanDraft, ScorerRequest, Stage
from infer_align.types import Capability

Mode: TypeAlias = Literal["score", "pairwise"]
Scale: TypeAlias = Literal[5, 10, 100]
Readout: TypeAlias = Literal["expected", "geval", "published"]

CRITERIA = "helpful, correct and clear"
# The configured reward that this method adds to the plan.
REWARD = "trust_judge"


def _check_words(text: str) -> str:
    if not text.strip():
        raise ValueError("words; leave it out for the judge's own criteria")
    return text


Criteria = Annotated[
    str,
    Len(max_length=4000),
    AfterValidator(_check_words),
    Field(json_schema_extra={"pattern": r"\S"}),
]


@dataclass(frozen=True, slots=True)
class TrustJudge:
    """Let a judge score or compare the candidates. Omitted parameters are as configured."""

    mode: Mode | None = field(
        default=None,
        metadata={
            "description": '"score": one score per candidate; "pairwise": compare candidates in '
            "both orders and use their win rates."
        },
    )
    scale: Scale | None = field(
        default=None, metadata={"description": "Highest score that the judge may give."}
    )
    criteria: Criteria | None = field(
        default=None, metadata={"description": "What to judge by, in words."}
    )
    weight: float = field(
        default=1.0,
        metadata={
            "ge": 0,
            "le": 1e9,
            "description": "Weight of the judge in the sum of rewards; its scores are from 1 to 5.",
        },
    )
    readout: Readout | None = field(
        default=None,
        metadata={
            "description": '"expected": mean over the labels; "geval": the same without '
            'renormalising; "published": the paper\'s code, bugs included.'
        },
    )

    stage: ClassVar[Stage] = Stage.SCORE
    # The judge's engine needs capabilities, not the engine that answers.
    needs: ClassVar[frozenset[Capability]] = frozenset()

    def apply(self, draft: PlanDraft) -> PlanDraft:
        """Add the judge to the plan's scorers, with the parameters that this request sets."""
        parameters = dataclasses.asdict(self)
        weight = parameters.pop("weight")
        overrides = {name: value for name, value in parameters.items() if value is not None}
        judge = ScorerRequest(REWARD, weight, overrides)
        return replace(draft, scorers=(*draft.scorers, judge))


plugin = TrustJudge
