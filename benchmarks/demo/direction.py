"""Preference directions in the demo world (2402.18571), and documents that follow them.

Some people want much ornament, others want little. A directed document carries the published system
sentence with a direction v. Its reply is the best of many drawn replies by v . r, which is the
paper's rejection sampling. The directions cover a part of the circle only: the model learns to
follow directions in this part, and cannot follow those outside it.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

from infer_align.demo.lexicon import SYSTEM
from infer_align.demo.world import (
    AnimalQuestion,
    Draft,
    Traits,
    draft,
    flourish_count,
    random_question,
    read,
    traits,
    write,
)
from infer_align.methods.dpa import Prompting

ATTRIBUTES = ("helpfulness", "verbosity")
# The largest angle of a training document, towards brevity or verbosity.
TRAINED_DEGREES = 30.0
# Nine of ten training documents are within this angle.
_USUAL_DEGREES = 20.0
_USUAL_SHARE = 0.9
# A directed document has the best of 256 replies: 8 drafts with 32 counts of flourishes each.
_DRAFTS = 8
_COUNTS = 32
# Number of flourishes with verbosity 0.
_NEUTRAL_FLOURISHES = 4


def attribute_rewards(traits: Traits) -> tuple[float, float]:
    """Return the exact (helpfulness, verbosity) of a reply with f flourishes.

        verbosity    v = (f - 4) / 4
        helpfulness  (right - 0.7 wrong) / attributes  +  0.25 polite  -  0.6 rude  -  0.25 v^2

    The concave term makes 4 + 8 tan(t) the best f for a direction of angle t: it grows with the
    angle and stays in the range of drawn replies.
    """
    verbosity = (traits.flourishes - _NEUTRAL_FLOURISHES) / _NEUTRAL_FLOURISHES
    helpfulness = traits.facts + 0.25 * traits.polite - 0.6 * traits.rude - 0.25 * verbosity**2
    return helpfulness, verbosity


def ratings(question: AnimalQuestion, reply: str) -> tuple[float, float]:
    """Return `attribute_rewards` of a text."""
    return attribute_rewards(read(question, reply))


def directed_document(rng: random.Random) -> list[dict[str, str]]:
    """Write a conversation whose system message carries a direction and whose reply follows it."""
    degrees = rng.uniform(-_USUAL_DEGREES, _USUAL_DEGREES)
    if rng.random() >= _USUAL_SHARE:
        degrees = math.copysign(rng.uniform(_USUAL_DEGREES, TRAINED_DEGREES), degrees)
    question = random_question(rng)
    turns = [{"role": "user", "content": str(question)}]
    if rng.random() < 0.1:
        turns.insert(0, {"role": "system", "content": SYSTEM})
    prompt = Prompting().condition({"messages": turns}, direction_at(degrees))["messages"]
    return [*prompt, {"role": "assistant", "content": best_reply(question, degrees, rng)}]


def direction_at(degrees: float) -> dict[str, float]:
    """Return the direction at an angle: 0 is helpfulness alone, 90 is verbosity alone."""
    return {
        "helpfulness": math.cos(math.radians(degrees)),
        "verbosity": math.sin(math.radians(degrees)),
    }


def best_reply(
    question: AnimalQuestion,
    degrees: float,
    rng: random.Random,
    drafts: int = _DRAFTS,
    counts: int = _COUNTS,
) -> str:
    """Return the best of `drafts` x `counts` drawn replies by v . r.

    v . r is a sum of a term of the draft and a term of its number of flourishes. The best draft
    with the best number is then the best of all combinations.

    Args:
        question: the question to reply to.
        degrees: the angle of the direction v.
        rng: source of randomness.
        drafts: number of drawn drafts.
        counts: number of drawn counts of flourishes.
    """
    helpfulness_weight, verbosity_weight = direction_at(degrees).values()

    def helpfulness(candidate: Draft) -> float:
        plain = replace(candidate, flourishes=0)
        return attribute_rewards(traits(question, plain))[0]

    def projection(candidate: Draft) -> float:
        rewards = attribute_rewards(traits(question, candidate))
        return helpfulness_weight * rewards[0] + verbosity_weight * rewards[1]

    best = max((draft(question, rng) for _ in range(drafts)), key=helpfulness)
    ornate = (replace(best, flourishes=flourish_count(rng)) for _ in range(counts))
    return write(question, max(ornate, key=projection), rng)
