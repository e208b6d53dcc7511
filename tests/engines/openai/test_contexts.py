"""The contexts of a guided draw are read once each, and their tokens are guided exactly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from infer_align.engines.openai.contexts import GuidanceContexts
from infer_align.methods.guidance import guide
from infer_align.steering import Contrast, Guidance

BODY = {"messages": [{"role": "user", "content": "q"}]}


def body(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": text}, *BODY["messages"]]}


def contexts(*contrasts: Contrast, min_p: float = 0.0) -> GuidanceContexts:
    return GuidanceContexts.of(BODY, Guidance(contrasts, min_p))


def distribution(seed: int, size: int = 6) -> dict[int, float]:
    logits = np.random.default_rng(seed).normal(0, 2, size)
    return dict(enumerate((logits - np.logaddexp.reduce(logits)).tolist()))


def test_equal_bodies_are_one_context() -> None:
    made = contexts(
        Contrast("kind", 1.0, body("kind"), body("rude")),
        Contrast("polite", 2.0, body("kind")),
        Contrast("rude", -1.0, body("rude"), dict(BODY)),
    )
    assert made.bodies == (BODY, body("kind"), body("rude"))
    assert made.pairs == ((1, 2), (1, 0), (2, 0))
    assert made.params == (None, "align.guidance.scale.kind", "align.guidance.scale.kind")
    assert made.names[2] == "with the negative prompt of 'kind'"


@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_tokens_that_every_context_shows_are_guided_exactly(min_p: float) -> None:
    made = contexts(
        Contrast("kind", 1.5, body("kind")),
        Contrast("brief", -2.0, body("brief"), body("long")),
        min_p=min_p,
    )
    tops = [distribution(seed) for seed in range(4)]
    rows = np.array([list(each.values()) for each in tops])
    expected = guide(rows[0], [[rows[1], rows[0]], [rows[2], rows[3]]], [1.5, -2.0], min_p)
    guided = made.guided(tops)
    assert list(guided) == np.flatnonzero(expected > -np.inf).tolist()
    assert list(guided.values()) == expected[expected > -np.inf].tolist()


def test_a_token_that_a_context_does_not_show_is_as_likely_as_it_can_be_there() -> None:
    made = contexts(Contrast("kind", 2.0, body("kind")))
    # The least likely shown token bounds token 1 in the first context, the rest does in the second.
    tops = [{0: math.log(0.5), 2: math.log(0.1)}, {0: math.log(0.5), 1: math.log(0.45)}]
    guided = made.guided(tops)
    assert guided[1] == pytest.approx(math.log(0.1) + 2 * math.log(0.45 / 0.1))
    assert guided[2] == pytest.approx(math.log(0.1) + 2 * math.log(0.05 / 0.1))


def test_probabilities_that_sum_to_one_leave_a_little_for_the_other_tokens() -> None:
    made = contexts(Contrast("kind", 1.0, body("kind")))
    guided = made.guided([{0: 0.0}, {1: 0.0}])
    assert guided[1] == pytest.approx(0.0)
    assert guided[0] == pytest.approx(math.log(1e-6))


def test_excluded_tokens_hide_no_other_token() -> None:
    made = contexts(Contrast("kind", 1.0, body("kind")), min_p=0.5)
    tops = [{0: math.log(0.9), 1: math.log(0.05)}, {0: math.log(0.9), 1: math.log(0.05)}]
    assert list(made.guided(tops)) == [0]
    assert list(made.guided(tops, excluded={0})) == [1]
    assert made.guided(tops, excluded={0, 1}) == {}
