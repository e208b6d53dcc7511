"""Preference directions in the demo world (2402.18571): two exact attributes of a reply, and documents that follow a direction.

Some people want much ornament and some want little. A directed document carries the published system sentence with a
direction v in it, and its reply is the best of many drawn replies by v . r: the paper's rejection sampling. Directions
cover a part of the circle only, so that there is a range in which the model learnt to follow and one in which it did not.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

from infer_align.demo.lexicon import SYSTEM
from infer_align.demo.world import (
    Draft,
    Question,
    Traits,
    draft,
    flourish_count,
    random_question,
    read,
    traits,
    word,
)
from infer_align.methods.dpa import Prompting

__all__ = [
    "ATTRIBUTES",
    "TRAINED_DEGREES",
    "at",
    "attribute_rewards",
    "best_reply",
    "directed",
    "ratings",
]

ATTRIBUTES = ("helpfulness", "verbosity")

TRAINED_DEGREES = 30.0
"""The largest angle, towards brevity or verbosity, that any document carries; nine in ten are within ``_USUAL_DEGREES``."""

_USUAL_DEGREES = 20.0
_USUAL_SHARE = 0.9
_OPENINGS, _COUNTS = 8, 32  # a directed document keeps the best of the 256 replies that these make
_BALANCE = 4  # flourishes that people want who ask for helpfulness alone


def attribute_rewards(t: Traits) -> tuple[float, float]:
    """The exact (helpfulness, verbosity) of a reply with f flourishes.

    ::

        verbosity    v = (f - 4) / 4
        helpfulness  (right - 0.7 wrong) / asked  +  0.25 polite  -  0.6 rude  -  0.25 v^2

    The concave term makes the best f for a direction of angle t 4 + 8 tan(t): graded, and inside the range of what is drawn.
    """
    verbosity = (t.flourishes - _BALANCE) / _BALANCE
    return t.facts + 0.25 * t.polite - 0.6 * t.rude - 0.25 * verbosity**2, verbosity


def ratings(question: Question, reply: str) -> tuple[float, float]:
    """``attribute_rewards`` of a text."""
    return attribute_rewards(read(question, reply))


def directed(rng: random.Random) -> list[dict[str, str]]:
    """A conversation whose system message carries a direction and whose reply follows it; in some it says more."""
    degrees = rng.uniform(-_USUAL_DEGREES, _USUAL_DEGREES)
    if rng.random() >= _USUAL_SHARE:
        degrees = math.copysign(rng.uniform(_USUAL_DEGREES, TRAINED_DEGREES), degrees)
    question = random_question(rng)
    turns = [{"role": "user", "content": str(question)}]
    if rng.random() < 0.1:
        turns.insert(0, {"role": "system", "content": SYSTEM})
    told = Prompting().condition({"messages": turns}, at(degrees))["messages"]
    return [*told, {"role": "assistant", "content": best_reply(question, degrees, rng)}]


def at(degrees: float) -> dict[str, float]:
    """The direction at this angle: 0 is helpfulness alone, 90 verbosity alone."""
    return {
        "helpfulness": math.cos(math.radians(degrees)),
        "verbosity": math.sin(math.radians(degrees)),
    }


def best_reply(
    question: Question,
    degrees: float,
    rng: random.Random,
    openings: int = _OPENINGS,
    counts: int = _COUNTS,
) -> str:
    """The best by v . r of all replies that so many drawn drafts make with so many drawn counts of flourishes.

    v . r is a sum over the two, so the best of each make the best of all.
    """
    helpfulness, verbosity = at(degrees).values()

    def projected(d: Draft) -> float:
        h, v = attribute_rewards(traits(question, d))
        return helpfulness * h + verbosity * v

    best = max(
        (draft(question, rng) for _ in range(openings)),
        key=lambda d: attribute_rewards(traits(question, replace(d, flourishes=0)))[0],
    )
    return word(
        question,
        max((replace(best, flourishes=flourish_count(rng)) for _ in range(counts)), key=projected),
        rng,
    )
