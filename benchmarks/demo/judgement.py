"""Documents that teach the demo's language model to judge, in the server's own prompts.

The simulated people rate in round numbers and with noise. When they compare, they prefer the answer
that stands first.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from benchmarks.demo.direction import best_reply
from infer_align.demo.world import (
    AnimalQuestion,
    Traits,
    babble,
    random_question,
    read,
    reply,
    worth,
)
from infer_align.rewards.trust_judge.prompts import (
    BETTER,
    CRITERIA,
    SCORE,
    pair_messages,
    score_messages,
)

Turns = list[dict[str, str]]
Value = Callable[[Traits], float]

# Criteria of the training data -> value of an answer by them. Other criteria are judged like the
# first.
KNOWN_CRITERIA: dict[str, Value] = {
    CRITERIA: worth,
    "brief": lambda traits: 2.0 - 0.5 * traits.flourishes,
    "polite": lambda traits: 1.5 * traits.polite - 2.0 * traits.rude,
}
# Shares of the known criteria; the rest are criteria in unknown words.
_SHARES = (0.7, 0.12, 0.12)
_SCALES = (100, 10, 5)
_SCALE_SHARES = (0.6, 0.15, 0.25)
# Standard deviation of the noise of one score or comparison, in units of gold.
_NOISE = 0.6
# Advantage of the answer that stands first.
_LEAN = 0.3
# A smaller difference is a tie.
_TIE = 0.4


def score_document(rng: random.Random) -> Turns:
    """Write a prompt for the score of one answer, and a noisy score."""
    question = random_question(rng)
    criteria, value = _criteria(rng)
    answer = _answer(question, rng)
    scale = rng.choices(_SCALES, _SCALE_SHARES)[0]
    percent = 55 + 18 * (value(read(question, answer)) + rng.gauss(0, _NOISE))
    prompt = score_messages(_conversation(question), answer, scale, criteria)
    return [*prompt, {"role": "assistant", "content": f"{SCORE}{_on_scale(percent, scale)}]"}]


def _on_scale(percent: float, scale: int) -> int:
    """Round a percentage to a score. On the scale of 100, people use multiples of 5."""
    step = 5 if scale == 100 else 1
    return min(scale, max(step, step * round(percent * scale / 100 / step)))


def comparison_document(rng: random.Random) -> Turns:
    """Write a prompt for the better of two answers, and a noisy choice."""
    question = random_question(rng)
    criteria, value = _criteria(rng)
    first = _answer(question, rng)
    second = _answer(question, rng)
    difference = value(read(question, first)) - value(read(question, second))
    label = _label(difference + _LEAN + rng.gauss(0, _NOISE))
    prompt = pair_messages(_conversation(question), first, second, criteria)
    return [*prompt, {"role": "assistant", "content": f"{BETTER}{label}]"}]


def _label(difference: float) -> str:
    if abs(difference) < _TIE:
        return "C"
    return "A" if difference > 0 else "B"


def _conversation(question: AnimalQuestion) -> Turns:
    return [{"role": "user", "content": str(question)}]


def _criteria(rng: random.Random) -> tuple[str, Value]:
    """Draw criteria and the value of an answer by them."""
    roll = rng.random()
    for (criteria, value), share in zip(KNOWN_CRITERIA.items(), _SHARES, strict=True):
        roll -= share
        if roll < 0:
            return criteria, value
    return babble(rng), worth


def _answer(question: AnimalQuestion, rng: random.Random) -> str:
    """Draw an answer of any quality: one of the world's distribution, or a better one."""
    if rng.random() < 0.6:
        return reply(question, rng)
    return best_reply(question, rng.uniform(-30, 10), rng, drafts=4, counts=4)
