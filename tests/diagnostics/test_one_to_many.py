"""Right answers against all wrong ones, against a count over all subsets."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.diagnostics.one_to_many import one_to_many


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from([0.0, 0.2, 1.0])), min_size=2, max_size=7
    ),
    st.integers(1, 4),
)
def test_equals_the_count_over_all_subsets(
    answers: list[tuple[int, float]], wrong_answers: int
) -> None:
    scores, ratings = zip(*answers, strict=True)
    result = one_to_many(scores, ratings, wrong_answers)
    if len(set(ratings)) == 1:
        assert result is None
        return
    middle = (min(ratings) + max(ratings)) / 2
    right = [s for s, r in answers if r == max(ratings)]
    wrong = [s for s, r in answers if r < middle]
    assert result is not None
    k = min(wrong_answers, len(wrong))
    wins = [
        all(s > w for w in subset) for s in right for subset in itertools.combinations(wrong, k)
    ]
    assert result.one_over_many == pytest.approx(np.mean(wins))
    assert result.all_over_all == float(min(right) > max(wrong))
    ranks = [1 / (1 + sum(w >= s for w in wrong)) for s in right]
    assert result.reciprocal_rank == pytest.approx(np.mean(ranks))
    assert result.chance == 1 / (k + 1)


def test_random_scores_win_by_chance() -> None:
    generator = np.random.default_rng(3)
    ratings = [1.0] + [0.0] * 30
    results = [one_to_many(generator.normal(size=31), ratings) for _ in range(4000)]
    shares = [result.one_over_many for result in results if result]
    assert np.mean(shares) == pytest.approx(0.1, abs=0.01)


def test_a_constant_reward_never_wins() -> None:
    result = one_to_many([0.0] * 4, [1.0, 0.0, 0.0, 0.0])
    assert result is not None
    assert (result.all_over_all, result.one_over_many) == (0.0, 0.0)


def test_answers_without_a_score_are_left_out() -> None:
    result = one_to_many([2.0, math.nan, 1.0], [1.0, 0.0, 0.0])
    assert result is not None
    assert (result.wrong, result.all_over_all) == (1, 1.0)
    assert one_to_many([math.nan, 1.0], [1.0, 0.0]) is None
