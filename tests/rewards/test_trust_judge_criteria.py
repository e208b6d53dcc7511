"""How the readings of several criteria become one score and one chance."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.rewards.trust_judge.criteria import (
    KNOWN_ASPECTS,
    Criterion,
    Objective,
    aspect_texts,
)

BRIEF = Criterion("brief")
POLITE = Criterion("polite", weight=3.0)
RUDE = Criterion("rude", negate=True)
SOURCED = Criterion("names a source", hard=True)


def test_principles_average_by_their_weights() -> None:
    assert Objective((BRIEF, POLITE)).score((10.0, 50.0), 100) == pytest.approx(40.0)
    assert Objective((BRIEF, POLITE)).chance((0.2, 0.8)) == pytest.approx(0.65)


def test_a_negated_principle_is_mirrored() -> None:
    assert Objective((RUDE,)).score((1.0,), 5) == 5.0
    assert Objective((RUDE,)).score((4.0,), 5) == pytest.approx(2.0)
    assert Objective((RUDE,)).chance((0.9,)) == pytest.approx(0.1)


def test_hard_rules_multiply() -> None:
    objective = Objective((SOURCED, BRIEF))
    assert objective.score((1.0, 100.0), 100) == 1.0, "a broken rule leaves nothing"
    assert objective.score((100.0, 30.0), 100) == pytest.approx(30.0)
    assert objective.score((50.5, 100.0), 100) == pytest.approx(50.5)
    assert Objective((SOURCED,)).score((70.0,), 100) == pytest.approx(70.0)
    assert objective.chance((1.0, 0.1)) == 1.0, "only the first answer follows the rule"
    assert objective.chance((0.5, 0.8)) == pytest.approx(0.8)


def test_hard_rules_that_exclude_both_answers_leave_a_tie() -> None:
    other = Criterion("is in English", hard=True)
    assert Objective((SOURCED, other)).chance((1.0, 0.0)) == 0.5


def test_a_missing_reading_leaves_the_combination_missing() -> None:
    assert math.isnan(Objective((BRIEF, POLITE)).score((math.nan, 50.0), 100))
    assert math.isnan(Objective((BRIEF, POLITE)).chance((0.5, math.nan)))


def test_a_plain_criterion_is_its_own_reading() -> None:
    assert Objective((BRIEF,)).score((76.123456789,), 100) == 76.123456789


criteria = st.builds(
    Criterion,
    st.just("x"),
    weight=st.floats(0.1, 9),
    negate=st.booleans(),
    hard=st.booleans(),
)


@pytest.mark.slow
@given(st.lists(st.tuples(criteria, st.sampled_from([0.0, 0.1, 0.5, 0.7, 1.0])), min_size=1))
def test_the_chances_of_both_answers_sum_to_one(readings: list[tuple[Criterion, float]]) -> None:
    objective = Objective(tuple(criterion for criterion, _ in readings))
    chances = [chance for _, chance in readings]
    first = objective.chance(chances)
    second = objective.chance([1.0 - chance for chance in chances])
    assert 0 <= first <= 1
    assert first + second == pytest.approx(1.0)


def test_a_list_of_aspects_holds_known_names_and_words() -> None:
    texts = aspect_texts(("honesty", "easy_to_read"))
    assert texts == {"honesty": KNOWN_ASPECTS["honesty"], "easy_to_read": "easy to read"}
    assert aspect_texts({"tone": "polite"}) == {"tone": "polite"}
