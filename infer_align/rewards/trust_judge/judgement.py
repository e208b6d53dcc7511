"""The result of one prompt to a judge."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from infer_align.decoding.labels import LabelLogprobs, merge_labels
from infer_align.rewards.trust_judge.readings import Reading
from infer_align.types import Candidate, ScoringUsage


@dataclass(frozen=True, slots=True)
class Judgement:
    """The result of one prompt to the judge."""

    reading: Reading | None  # None if there is nothing to read; `error` then holds the reason
    mass: float = 0.0  # probability on valid labels
    error: str | None = None
    spent: ScoringUsage = field(default_factory=ScoringUsage)


def label_probabilities(answer: LabelLogprobs) -> list[tuple[str, float]]:
    """Return the possible labels with their probabilities, likeliest first."""
    merged = merge_labels(answer.logprobs)
    possible = {label: p for label, p in merged.items() if p > -math.inf}
    likeliest_first = sorted(possible, key=lambda label: -math.exp(possible[label]))
    return [(label, math.exp(possible[label])) for label in likeliest_first]


def refusal(share: float) -> str:
    """Return the reason why labels with this share of the probability are not read."""
    return f"the judge gave its labels {share:.2g} of the probability: a refusal"


def usage_of(candidate: Candidate) -> ScoringUsage:
    """Return the usage of a text that the judge wrote."""
    return ScoringUsage(
        judge_calls=candidate.calls,
        judge_prompt_tokens=candidate.prompt_tokens,
        judge_completion_tokens=candidate.completion_tokens,
    )


def usage_of_labels(answer: LabelLogprobs) -> ScoringUsage:
    """Return the usage of reading labels. Each call samples one token."""
    return ScoringUsage(0, answer.calls, answer.prompt_tokens, answer.calls)
