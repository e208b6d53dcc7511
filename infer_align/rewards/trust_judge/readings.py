"""From label probabilities to scores and relations: how a judge is read.

TrustJudge (2509.21117), sections 3.1 and 3.2. The readout "expected" is the expectation over the valid labels, renormalised to
their mass; the published code differs in ways that "published" reproduces: weights odds(p)^5 instead of p, labels of
probability 1 thrown away, and a score of 0 where no label is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Readout = Literal["expected", "geval", "published"]
Rule = Literal["first_label", "likelihood", "perplexity"]
Relation = Literal["larger", "smaller", "equal"]  # of the first answer to the second
Probs = Sequence[tuple[str, float]]

LARGER: Relation = "larger"
SMALLER: Relation = "smaller"
EQUAL: Relation = "equal"
_OF_SIDE: dict[str, Relation] = {"A": LARGER, "B": SMALLER, "C": EQUAL}
_SWAPPED = {"A": "B", "B": "A", "C": "C"}
_SPACE = str.maketrans("", "", "Ġ▁")  # how vocabularies write a leading space
_EPSILON, _TEMPERATURE = 1e-8, 0.2  # of the published weights
_ROUNDING = 1e-12  # masses nearer than this are one: which is larger is only the order of the sum


@dataclass(frozen=True, slots=True)
class Reading:
    """One judgement: labels with their probabilities, the one that was said first; and how likely all that the judge said was."""

    probs: Probs  # labels are compared as they are
    cumulative_logprob: float | None = None  # nats
    tokens: int | None = None

    @property
    def perplexity(self) -> float:
        """exp(-cumulative_logprob / tokens).

        Raises:
            ValueError: nothing was said, or it is not known how likely it was.
        """
        if self.cumulative_logprob is None or not self.tokens or self.tokens < 0:
            raise ValueError(
                f"perplexity: {self.tokens} tokens of log-probability {self.cumulative_logprob}; must be at least one, and known."
            )
        return math.exp(-self.cumulative_logprob / self.tokens)


def expected_score(
    probs: Iterable[Sequence[object]], scale: int, readout: Readout = "expected"
) -> float:
    """The score on 1..scale; NaN where no valid label has any mass.

    Args:
        probs: (label, probability) pairs; a label is valid when it reads as a whole number of the scale.
        scale: the highest label.
        readout: "expected" is the mean over the valid labels, renormalised; "geval" does not divide by their mass, so that
            it is lower the less of it there is; "published" is the paper's code, where the mean of nothing is 0.

    Raises:
        ValueError: no such readout.
    """
    if readout not in get_args(Readout):
        raise ValueError(
            f"readout: {readout!r} is not allowed; must be one of {', '.join(get_args(Readout))}."
        )
    valid = [
        (value, float(p))  # type: ignore[arg-type]
        for label, p in probs
        if (value := label_value(str(label), scale)) is not None
    ]
    if readout == "published":
        return _published(valid)
    mass = math.fsum(p for _, p in valid)
    if not mass > 0.0:
        return math.nan
    total = math.fsum(value * p for value, p in valid)
    return total if readout == "geval" else min(float(scale), max(1.0, total / mass))


def _published(valid: Sequence[tuple[int, float]]) -> float:
    logits = [
        (value, math.log((p + _EPSILON) / (1.0 - p + _EPSILON)) / _TEMPERATURE)
        for value, p in valid
        if 0.0 < p < 1.0
    ]
    if not logits:
        return 0.0
    highest = max(logit for _, logit in logits)
    weights = [(value, math.exp(logit - highest)) for value, logit in logits]
    return math.fsum(value * w for value, w in weights) / math.fsum(w for _, w in weights)


def label_value(label: str, scale: int) -> int | None:
    """The whole number from 1 to `scale` that a label reads as, in any spelling that Python's float takes; else None."""
    try:
        value = float(label.translate(_SPACE))
    except ValueError:
        return None
    return int(value) if 1 <= value <= scale and value.is_integer() else None


def mass(probs: Probs, labels: Iterable[str]) -> float:
    """How much of the probability is on these labels: little of it is a refusal."""
    among = {*labels}
    return math.fsum(p for label, p in probs if label in among)


def rescale(score: float, scale: int) -> float:
    """From 1..scale to 1..5, affine: 1 is 1 and `scale` is 5, exactly. The paper's x 4/(scale - 1) has no offset."""
    if score == scale:
        return 5.0
    return 1.0 + (score - 1.0) * (4.0 / (scale - 1.0))


def relation(order1: Reading, order2: Reading, rule: Rule, tolerance: float = 0.0) -> Relation:
    """How the answer that was A in order 1, and B in order 2, compares to the other.

    Args:
        order1: the judgement with the answer shown first.
        order2: the judgement with the two answers exchanged.
        rule: "first_label": what both orders said first, else equal. "likelihood": the label with the most probability
            over both orders. "perplexity": what the order of lower perplexity said first.
        tolerance: equal below this: half the distance of the two likeliest labels, or the distance of the perplexities.

    Raises:
        ValueError: an order holds none of A, B, C (the pair is not judged), or has no perplexity where the rule needs it; no such
            rule, or no such tolerance.
    """
    if rule not in get_args(Rule) or not tolerance >= 0:
        raise ValueError(
            f"rule {rule!r} and tolerance {tolerance}: must be one of {', '.join(get_args(Rule))}, and at least 0."
        )
    first, second = _first(order1), _SWAPPED.get(_first(order2), "")
    if rule == "first_label":
        return _OF_SIDE.get(first, EQUAL) if first == second else EQUAL
    if rule == "perplexity":
        gap = order2.perplexity - order1.perplexity
        if abs(gap) <= tolerance:
            return EQUAL
        if (side := first if gap > 0 else second) not in _OF_SIDE:
            raise ValueError(
                "probs: what the order of lower perplexity said first is none of A, B, C."
            )
        return _OF_SIDE[side]
    merged = merge(order1, order2)
    (_, runner_up), (side, most) = sorted(merged.items(), key=lambda item: item[1])[-2:]
    distance = most - runner_up
    return EQUAL if distance <= _ROUNDING or distance / 2 < tolerance else _OF_SIDE[side]


def merge(order1: Reading, order2: Reading) -> dict[str, float]:
    """A, B, C -> probability over both orders, the second's letters exchanged; sums to at most 2."""
    total = dict.fromkeys(_OF_SIDE, 0.0)
    for reading, names in (
        (order1, dict(zip(_OF_SIDE, _OF_SIDE, strict=True))),
        (order2, _SWAPPED),
    ):
        for label, p in reading.probs:
            if label in names:
                total[names[label]] += p
    return total


def _first(reading: Reading) -> str:
    """What was said first."""
    if not any(label in _OF_SIDE for label, _ in reading.probs):
        raise ValueError(
            f"probs: {[label for label, _ in reading.probs][:5]} hold none of A, B, C."
        )
    return reading.probs[0][0]


def _clean(label: str) -> str:
    return label.translate(_SPACE).strip()


def extract(positions: Iterable[Probs], allowed: Iterable[str]) -> list[tuple[str, float]]:
    """The label probabilities in a written judgement, as the published code finds them: between "[" and "]", one token.

    For judgements that were generated elsewhere. It misses numbers of several tokens and brackets glued to their label; a
    judge that is asked for its labels here misses neither.

    Args:
        positions: per token, (token, probability) pairs, the sampled one first.
        allowed: labels; numbers are compared as numbers.

    Raises:
        ValueError: there is none.
    """
    tokens = [_merged(position) for position in positions]
    names = {*allowed}
    numbers = {float(name) for name in names if name.isdecimal()}
    for start, token in enumerate(tokens):
        if next(iter(token), None) != "[":
            continue
        end = next(
            (i for i in range(start + 1, min(start + 6, len(tokens))) if "]" in tokens[i]), None
        )
        if end == start + 2 and _is_allowed(next(iter(tokens[start + 1]), ""), names, numbers):
            return list(tokens[start + 1].items())
    raise ValueError("no label of one token between brackets.")


def _merged(position: Probs) -> dict[str, float]:
    total: dict[str, float] = {}
    for token, p in position:
        total[_clean(token)] = total.get(_clean(token), 0.0) + p
    return total


def _is_allowed(label: str, names: set[str], numbers: set[float]) -> bool:
    if not numbers:
        return label in names
    try:
        return float(label) in numbers
    except ValueError:
        return False
