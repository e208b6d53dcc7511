"""TrustJudge: use a judge as a reward, read from the probabilities of its labels.

This file holds what a request may ask of the judge. The judge itself stands in
`infer_align.rewards.trust_judge`.

Sources: "TrustJudge" (2509.21117); principles: "SALMON" (2310.05910); rubrics: "OpenRubrics"
(2510.07743); votes: "Think-RM" (2505.16265); aspects: "UltraFeedback" (2310.01377).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from annotated_types import Ge, Le, Len
from pydantic import AfterValidator, Field

from infer_align.errors import WrongField
from infer_align.methods import PlanDraft, ScorerRequest, Stage
from infer_align.types import Capability

Mode: TypeAlias = Literal["score", "pairwise"]
Scale: TypeAlias = Literal[5, 10, 100]
Readout: TypeAlias = Literal["expected", "geval", "published"]

CRITERIA = "helpful, correct and clear"
# The value of `rubric` that lets the judge write its rubric itself.
AUTO = "auto"
MAX_PRINCIPLES = 16
MAX_ASPECTS = 8
MAX_VOTES = 64
# The tags of the lines of a rubric.
HARD_TAG = re.compile(r"[\[(]\s*hard(?:\s+rule)?\s*[\])]\s*[.:]?\s*", re.IGNORECASE)
PRINCIPLE_TAG = re.compile(r"[\[(]\s*principle\s*[\])]\s*[.:]?\s*", re.IGNORECASE)
# The mark before an item of a list.
BULLET = re.compile(r"\A\s*(?:[-*•]|\d{1,2}[.)])\s*")
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


# The name of an aspect is the name of an attribute: "trust_judge.honesty".
AspectName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Aspects: TypeAlias = dict[AspectName, Criteria] | tuple[AspectName, ...]
Votes = Annotated[int, Ge(1), Le(MAX_VOTES)]


@dataclass(frozen=True, slots=True)
class Principle:
    """One quality that the judge reads by itself."""

    text: Criteria = field(
        metadata={"description": 'The quality in words, such as "polite" or "gives an example".'}
    )
    weight: float = field(
        default=1.0,
        metadata={
            "ge": 0,
            "le": 1e9,
            "description": "Weight in the mean over the principles. 0 reports the reading only.",
        },
    )
    negate: bool = field(
        default=False,
        metadata={"description": "Prefer the answers that have less of this quality."},
    )


Principles = Annotated[tuple[Principle, ...], Len(min_length=1, max_length=MAX_PRINCIPLES)]
RUBRIC = {
    "description": "Rules to judge by, one in each line. A line that ends with [Hard Rule] "
    "multiplies the score, every other line is a principle of the mean. "
    '"auto": the judge writes such a rubric for each conversation.'
}
PRINCIPLES = {
    "description": "Qualities that the judge reads one by one. The score is the weighted mean of "
    "the readings, which are in the report."
}
ASPECTS = {
    "description": "Qualities that become attributes of the judge, for `dpa`, `compose` and "
    '`rewards`: {name: words}, or a list of names such as "honesty".'
}
VOTES = {
    "description": "Number of sampled verdicts per reading, each after its own critique. The "
    "shares of the votes are the probabilities. 1: no votes."
}


def check_questions(
    principles: Sequence[Principle], rubric: str | None, aspects: Collection[str]
) -> None:
    """Check that what a judge is to read fits together.

    Raises:
        WrongField: saying what is allowed instead.
    """
    if aspects and (principles or rubric is not None):
        raise WrongField(
            "aspects",
            "aspects, or principles and a rubric, not both: each aspect is an attribute of its own",
        )
    if len(aspects) > MAX_ASPECTS or len({*aspects}) < len(aspects):
        raise WrongField("aspects", f"at most {MAX_ASPECTS} aspects, each with its own name")
    if principles and not any(principle.weight for principle in principles):
        raise WrongField("principles", "principles of which at least one has a weight over 0")
    rules = [line for line in (rubric or "").splitlines() if rule_words(line)]
    if rubric is not None and not rules:
        raise WrongField(
            "rubric",
            'a rubric with a rule, such as "Is polite. [Hard Rule]"; a tag or marks alone are none',
        )
    if len(rules) + len(principles) > MAX_PRINCIPLES:
        raise WrongField(
            "principles" if principles else "rubric",
            f"at most {MAX_PRINCIPLES} principles and lines of a rubric together",
        )


def rule_words(line: str) -> str:
    """Return a line of a rubric without its mark and tags; "" if it holds no words."""
    words = HARD_TAG.sub("", BULLET.sub("", line))
    words = PRINCIPLE_TAG.sub("", words).strip()
    return words if any(character.isalnum() for character in words) else ""


def check_replaced(
    criteria: str | None,
    principles: Sequence[Principle],
    rubric: str | None,
    aspects: Collection[str],
) -> None:
    """Check that a request has criteria or what replaces them, and that the latter fits together.

    Raises:
        WrongField: saying what is allowed instead.
    """
    is_replaced = bool(principles or aspects or rubric not in {None, AUTO})
    if criteria is not None and is_replaced:
        raise WrongField(
            "criteria",
            "criteria, or what replaces them (principles, a rubric, aspects), not both; write the "
            "criteria as a principle",
        )
    check_questions(principles, rubric, aspects)


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
    principles: Principles | None = field(default=None, metadata=PRINCIPLES)
    rubric: Criteria | None = field(default=None, metadata=RUBRIC)
    aspects: Aspects | None = field(default=None, metadata=ASPECTS)
    votes: Votes | None = field(default=None, metadata=VOTES)

    stage: ClassVar[Stage] = Stage.SCORE
    # The judge's engine needs capabilities, not the engine that answers.
    needs: ClassVar[frozenset[Capability]] = frozenset()

    def __post_init__(self) -> None:
        """Check that what is to be read fits together.

        Raises:
            WrongField: it does not; see `check_replaced`.
        """
        check_replaced(self.criteria, self.principles or (), self.rubric, self.aspects or ())

    def apply(self, draft: PlanDraft) -> PlanDraft:
        """Add the judge to the plan's scorers, with the parameters that this request sets."""
        overrides: dict[str, Any] = {}
        for parameter in dataclasses.fields(self):
            value = getattr(self, parameter.name)
            if parameter.name != "weight" and value is not None:
                overrides[parameter.name] = value
        judge = ScorerRequest(REWARD, self.weight, overrides)
        return replace(draft, scorers=(*draft.scorers, judge))


plugin = TrustJudge
