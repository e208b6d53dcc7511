"""Pairs of answers: who wins, and which of them have about the same length."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from infer_align.diagnostics.pairs import have_same_length, rated_pairs, wins


def test_a_tie_is_half_a_win_and_a_missing_score_none() -> None:
    assert np.array_equal(
        wins([0.2, 0.0, -3.0, math.nan]), [1.0, 0.5, 0.0, math.nan], equal_nan=True
    )


def test_lengths_within_a_tenth_are_the_same() -> None:
    first = [100, 110, 111, 0, 0]
    second = [110, 100, 100, 0, 1]
    assert have_same_length(first, second).tolist() == [True, True, False, True, False]


@given(
    st.lists(st.one_of(st.integers(0, 4), st.just(math.nan)), max_size=7),
    st.sampled_from([0.0, 1.0, 2.5]),
)
def test_pairs_are_all_answers_whose_ratings_differ_enough(
    ratings: list[float], gap: float
) -> None:
    pairs = {(int(i), int(j)) for i, j in rated_pairs(ratings, gap)}
    expected = set()
    for i, better in enumerate(ratings):
        for j, worse in enumerate(ratings):
            if better - worse > gap:
                expected.add((i, j))
    assert pairs == expected
