"""Documents that teach the demo's language model to judge, in the server's own judge format: noisy ratings and comparisons.

People of this world rate in round numbers and with noise; when they compare, they lean to the answer that stands first.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from benchmarks.demo.direction import best_reply
from infer_align.demo.world import Question, Traits, babble, random_question, read, reply, worth
from infer_align.rewards.trust_judge.prompts import (
    BETTER,
    CRITERIA,
    SCORE,
    pair_messages,
    score_messages,
)

__all__ = ["CRITERIA_KNOWN", "compared", "scored"]

Turns = list[dict[str, str]]

CRITERIA_KNOWN: dict[str, Callable[[Traits], float]] = {
    CRITERIA: worth,
    "brief": lambda t: 2.0 - 0.5 * t.flourishes,
    "polite": lambda t: 1.5 * t.polite - 2.0 * t.rude,
}
"""Criteria that the judge was taught -> what an answer is worth by them; by any others it judges as by the first."""

_SHARES = (0.7, 0.12, 0.12)  # the rest are criteria in other words
_SCALES = (100, 10, 5)
_SCALE_SHARES = (0.6, 0.15, 0.25)
_NOISE = 0.6  # standard deviation of what one rater or one comparison adds, in units of gold
_LEAN = 0.3  # to the answer that stands first
_TIE = 0.4


def scored(rng: random.Random) -> Turns:
    """A question, an answer, and somebody's score of it."""
    question, (criteria, value) = random_question(rng), _criteria(rng)
    answer, scale = _answer(question, rng), rng.choices(_SCALES, _SCALE_SHARES)[0]
    percent = 55 + 18 * (value(read(question, answer)) + rng.gauss(0, _NOISE))
    asked = score_messages(_asked(question), answer, scale, criteria)
    return [*asked, {"role": "assistant", "content": f"{SCORE}{_on_scale(percent, scale)}]"}]


def _on_scale(percent: float, scale: int) -> int:
    step = 5 if scale == 100 else 1  # nobody says 73
    return min(scale, max(step, step * round(percent * scale / 100 / step)))


def compared(rng: random.Random) -> Turns:
    """A question, two answers, and what somebody said who compared them."""
    question, (criteria, value) = random_question(rng), _criteria(rng)
    first, second = _answer(question, rng), _answer(question, rng)
    gap = (
        value(read(question, first)) - value(read(question, second)) + _LEAN + rng.gauss(0, _NOISE)
    )
    label = "C" if abs(gap) < _TIE else "A" if gap > 0 else "B"
    asked = pair_messages(_asked(question), first, second, criteria)
    return [*asked, {"role": "assistant", "content": f"{BETTER}{label}]"}]


def _asked(question: Question) -> Turns:
    return [{"role": "user", "content": str(question)}]


def _criteria(rng: random.Random) -> tuple[str, Callable[[Traits], float]]:
    roll = rng.random()
    for (criteria, value), share in zip(CRITERIA_KNOWN.items(), _SHARES, strict=True):
        if (roll := roll - share) < 0:
            return criteria, value
    return babble(rng), worth


def _answer(question: Question, rng: random.Random) -> str:
    """Of all qualities: as the world writes them, or better."""
    return (
        reply(question, rng)
        if rng.random() < 0.6
        else best_reply(question, rng.uniform(-30, 10), rng, 4, 4)
    )
