"""The section `[rewards.<name>]` of a judge."""

from __future__ import annotations

from dataclasses import dataclass, field

from infer_align.methods.trust_judge import (
    ASPECTS,
    CRITERIA,
    PRINCIPLES,
    RUBRIC,
    VOTES,
    Aspects,
    Criteria,
    Mode,
    Principles,
    Readout,
    Scale,
    Votes,
    check_questions,
)
from infer_align.rewards import DESCRIPTION, TIMEOUT
from infer_align.rewards.trust_judge.readings import Rule
from infer_align.rewards.trust_judge.reward import TrustJudgeReward
from infer_align.rewards.trust_judge.tournament import Schedule


@dataclass(frozen=True, slots=True)
class TrustJudgeSection:
    """A language model that scores or compares candidates.

    Fields set in `align.trust_judge` override the configured ones.
    """

    engine: str = field(
        default="served",
        metadata={"description": 'Engine that judges: "served", or a name of `[engines.*]`.'},
    )
    panel: tuple[str, ...] = field(
        default=(),
        metadata={
            "description": "Engines that judge together, instead of `engine`. Each is a member of "
            "the reward, and the report compares them."
        },
    )
    mode: Mode = field(
        default="score",
        metadata={
            "description": '"score" scores each candidate alone, "pairwise" compares candidates '
            "in both orders."
        },
    )
    scale: Scale = field(
        default=100, metadata={"description": "Highest score that the judge can give."}
    )
    criteria: Criteria = field(
        default=CRITERIA,
        metadata={
            "description": "Qualities to judge by, in words, if there are no principles, rubric or "
            "aspects."
        },
    )
    readout: Readout = field(
        default="expected",
        metadata={
            "description": '"expected": mean over the labels. "geval": the same without '
            'normalising. "published": the '
            "paper's code, bugs included."
        },
    )
    principles: Principles | tuple[()] = field(default=(), metadata=PRINCIPLES)
    rubric: Criteria | None = field(default=None, metadata=RUBRIC)
    rubric_labels: str | None = field(
        default=None,
        metadata={
            "description": "File of JSON lines with prompt, chosen and rejected. A rubric "
            '"auto" for a conversation of this file must reproduce its labels.'
        },
    )
    aspects: Aspects = field(default_factory=dict, metadata=ASPECTS)
    votes: Votes = field(default=1, metadata=VOTES)
    rule: Rule = field(
        default="likelihood",
        metadata={
            "description": 'How both orders of a comparison become one relation. "first_label": '
            "the likeliest label, if both "
            'orders agree. "likelihood": the label with the most probability over both orders. '
            '"perplexity": the likeliest '
            "label in the order with the lower perplexity."
        },
    )
    tolerance: float = field(
        default=0.0,
        metadata={"ge": 0, "description": "A comparison with a smaller difference is a tie."},
    )
    schedule: Schedule = field(
        default="round_robin",
        metadata={
            "description": '"round_robin" compares all pairs, "swiss" compares neighbours in the '
            "standings for log2 N + 1 rounds."
        },
    )
    critique_tokens: int = field(
        default=0,
        metadata={
            "ge": 0,
            "description": "Maximum number of tokens of a critique before the label; for "
            "reasoning judges. 0: no critique, or 256 tokens if the judge votes.",
        },
    )
    min_mass: float = field(
        default=0.1,
        metadata={
            "ge": 0,
            "le": 1,
            "description": "Minimum probability on valid labels. With less, the judge has "
            "refused, and the candidate is not scored.",
        },
    )
    description: str = field(default="", metadata=DESCRIPTION)
    timeout_seconds: float = field(default=60.0, metadata=TIMEOUT)

    def __post_init__(self) -> None:
        """Check that what is to be read fits together.

        Raises:
            ValueError: it does not.
        """
        check_questions(self.principles, self.rubric, self.aspects)
        if len({*self.panel}) < len(self.panel):
            raise ValueError("a panel in which each engine appears once")

    def load(self) -> TrustJudgeReward:
        """Return the reward. Its `engines` must be set before it starts."""
        return TrustJudgeReward(self)
