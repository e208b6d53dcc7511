"""Turn the probabilities of a judge's labels into scores and relations.

TrustJudge (2509.21117), sections 3.1 and 3.2. The readout "expected" is the expectation over the
valid labels, normalised by their probability. The published code differs, and the readout
"published" reproduces it: it weights labels by odds(p)^5 instead of p, ignores labels of
probability 1, and gives the score 0 if no label is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from infer_align.methods.trust_judge import Readout

Rule = Literal["first_label", "likelihood", "perplexity"]
Relation = Literal["larger", "smaller", "equal"]  # of the first answer to the second
Probs = Sequence[tuple[str, float]]  # (label, probability) pairs

LARGER: Relation = "larger"
SMALLER: Relation = "smaller"
EQUAL: Relation = "equal"
_RELATIONS: dict[str, Relation] = {"A": LARGER, "B": SMALLER, "C": EQUAL}
_SWAPPED = {"A": "B", "B": "A", "C": "C"}
# The characters that vocabularies write for a leading space.
_SPACE = str.maketrans("", "", "Ġ▁")
# Constants of the published weights.
_EPSILON = 1e-8
_TEMPERATURE = 0.2
# Probabilities nearer than this are equal: their difference is the rounding of a sum.
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Reading:
    """The labels of one judgement with their probabilities, the judge's own label first."""

    probs: Probs  # labels are compared as they are
    cumulative_logprob: float | None = None  # of everything the judge wrote, in nats
    tokens: int | None = None  # length of everything the judge wrote

    @property
    def perplexity(self) -> float:
        """Return exp(-cumulative_logprob / tokens).

        Raises:
            ValueError: the judge wrote nothing, or its log-probability is not known.
        """
        if self.cumulative_logprob is None or not self.tokens or self.tokens < 0:
            raise ValueError(
                f"perplexity: {self.tokens} tokens with log-probability {self.cumulative_logprob}; "
                f"both must be known, and there must be at least one token."
            )
        return math.exp(-self.cumulative_logprob / self.tokens)


def expected_score(
    probs: Iterable[Sequence[object]], scale: int, readout: Readout = "expected"
) -> float:
    """Return the score on 1..scale, or NaN if no valid label has any probability.

    Args:
        probs: (label, probability) pairs. A label is valid if it reads as a whole number of the
            scale.
        scale: the highest label.
        readout: "expected" is the mean of the valid labels, normalised by their probability.
            "geval" is not normalised: the score is lower if the valid labels have less probability.
            "published" is the paper's code, where the mean of no labels is 0.

    Raises:
        ValueError: the readout is unknown.
    """
    if readout not in get_args(Readout):
        raise ValueError(
            f"readout: {readout!r} is not allowed; must be one of {', '.join(get_args(Readout))}."
        )
    valid: list[tuple[int, float]] = []
    for label, p in probs:
        value = label_value(str(label), scale)
        if value is not None:
            valid.append((value, float(p)))  # type: ignore[arg-type]
    if readout == "published":
        return _published(valid)
    total_mass = math.fsum(p for _, p in valid)
    if not total_mass > 0.0:
        return math.nan
    total = math.fsum(value * p for value, p in valid)
    if readout == "geval":
        return total
    # Rounding must not move the mean off the scale.
    return min(float(scale), max(1.0, total / total_mass))


def _published(valid: Sequence[tuple[int, float]]) -> float:
    """Return the score as the paper's code computes it."""
    logits: list[tuple[int, float]] = []
    for value, p in valid:
        if 0.0 < p < 1.0:
            odds = (p + _EPSILON) / (1.0 - p + _EPSILON)
            logits.append((value, math.log(odds) / _TEMPERATURE))
    if not logits:
        return 0.0
    highest = max(logit for _, logit in logits)
    weights = [(value, math.exp(logit - highest)) for value, logit in logits]
    total_weight = math.fsum(weight for _, weight in weights)
    return math.fsum(value * weight for value, weight in weights) / total_weight


def label_value(label: str, scale: int) -> int | None:
    """Return the whole number from 1 to `scale` that a label spells, or None.

    Every spelling that Python's `float` accepts is a number.
    """
    try:
        value = float(label.translate(_SPACE))
    except ValueError:
        return None
    return int(value) if 1 <= value <= scale and value.is_integer() else None


def mass(probs: Probs, labels: Iterable[str]) -> float:
    """Return the probability on these labels.

    A small value means that the judge refused to use them.
    """
    valid = {*labels}
    return math.fsum(p for label, p in probs if label in valid)


def rescale(score: float, scale: int) -> float:
    """Map a score from 1..scale to 1..5, so that 1 stays 1 and `scale` becomes exactly 5.

    The paper multiplies by 4 / (scale - 1) without an offset.
    """
    if score == scale:
        return 5.0
    return 1.0 + (score - 1.0) * (4.0 / (scale - 1.0))


def relation(order1: Reading, order2: Reading, rule: Rule, tolerance: float = 0.0) -> Relation:
    """Return the relation of the answer that was A in order 1 to the other answer.

    Args:
        order1: the judgement with the answer shown first, as A.
        order2: the judgement with the two answers exchanged.
        rule: "first_label": the judge's own label, if both orders agree, else equal. "likelihood":
            the label with the most probability over both orders. "perplexity": the judge's own
            label in the order of lower perplexity.
        tolerance: a smaller difference is equal. It is half the difference of the two likeliest
            labels, or the difference of the perplexities.

    Raises:
        ValueError: an order holds none of A, B, C, so that the pair is not judged; or it has no
            perplexity and the rule needs it; or the rule is unknown or the tolerance negative.
    """
    if rule not in get_args(Rule) or not tolerance >= 0:
        raise ValueError(
            f"rule {rule!r} and tolerance {tolerance}: the rule must be one of "
            f"{', '.join(get_args(Rule))}, "
            f"the tolerance at least 0."
        )
    first = _first_label(order1)
    second = _SWAPPED.get(_first_label(order2), "")
    if rule == "first_label":
        return _RELATIONS.get(first, EQUAL) if first == second else EQUAL
    if rule == "likelihood":
        return _likelihood_relation(order1, order2, tolerance)
    difference = order2.perplexity - order1.perplexity
    if abs(difference) <= tolerance:
        return EQUAL
    side = first if difference > 0 else second
    if side not in _RELATIONS:
        raise ValueError(
            "probs: the first label of the order with the lower perplexity is none of A, B, C."
        )
    return _RELATIONS[side]


def _likelihood_relation(order1: Reading, order2: Reading, tolerance: float) -> Relation:
    """Return the relation with the most probability over both orders."""
    merged = merge(order1, order2)
    runner_up, winner = sorted(merged, key=lambda label: merged[label])[-2:]
    distance = merged[winner] - merged[runner_up]
    if distance <= _ROUNDING or distance / 2 < tolerance:
        return EQUAL
    return _RELATIONS[winner]


def merge(order1: Reading, order2: Reading) -> dict[str, float]:
    """Return the probability of A, B and C over both orders, at most 2 in total.

    The letters of order 2 are exchanged.
    """
    total = dict.fromkeys(_RELATIONS, 0.0)
    for label, p in order1.probs:
        if label in total:
            total[label] += p
    for label, p in order2.probs:
        if label in total:
            total[_SWAPPED[label]] += p
    return total


def _first_label(reading: Reading) -> str:
    """Return the judge's own label.

    Raises:
        ValueError: the reading holds none of A, B, C.
    """
    names = [label for label, _ in reading.probs]
    if not any(label in _RELATIONS for label in names):
        raise ValueError(f"probs: {names[:5]} hold none of A, B, C.")
    return names[0]
