"""Shapes and gates: what they do to any scores, and what a request may say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from infer_align.methods.compose import (
    RewardShape,
    cap,
    par,
    rank,
    shortfalls,
    standardize,
)

NAN = np.nan
EXTREME = st.sampled_from([0.0, 1.0, 1e308, -1e308, -np.inf, np.inf, 1e-308, NAN])
SCORES = st.lists(st.floats(-5, 5) | EXTREME, max_size=9).map(np.array)
SHAPES = [
    RewardShape(),
    RewardShape("standardize"),
    RewardShape("rank"),
    RewardShape("par"),
    RewardShape("par", references=3),
    RewardShape("cap"),
    RewardShape("cap", at=0.0),
]
pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(max_examples=50)
@given(scores=SCORES, random=st.randoms(use_true_random=False))
def test_a_shape_keeps_nan_and_order_and_moves_with_its_candidates(shape, scores, random):
    before = scores.copy()
    shaped = shape.apply(scores)
    np.testing.assert_array_equal(scores, before)
    np.testing.assert_array_equal(np.isnan(shaped), np.isnan(scores))
    scored = ~np.isnan(scores)
    ascending = shaped[scored][np.argsort(scores[scored], kind="stable")]
    for first, second in itertools.pairwise(ascending):
        assert first <= second or first == pytest.approx(second, rel=1e-9)
    order = list(range(len(scores)))
    random.shuffle(order)
    np.testing.assert_allclose(shape.apply(scores[order]), shaped[order], rtol=1e-9, atol=1e-12)


@given(SCORES)
def test_ranks_and_par_stay_between_0_and_1(scores):
    for shaped in (rank(scores), par(scores, scores), RewardShape("par").apply(scores)):
        inside = shaped[~np.isnan(shaped)]
        assert ((inside >= 0) & (inside <= 1)).all()


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9))
def test_ranks_are_average_ranks(scores):
    np.testing.assert_allclose(rank(scores), (rankdata(scores) - 1) / (len(scores) - 1))


def test_ranks_of_few_and_of_equal_scores():
    np.testing.assert_array_equal(rank([7.0]), [0.5])
    np.testing.assert_array_equal(rank([7.0, NAN]), [0.5, NAN])
    np.testing.assert_array_equal(rank([2.0, 2.0, 2.0]), [0.5, 0.5, 0.5])
    np.testing.assert_array_equal(rank([3.0, NAN, 1.0, 3.0]), [0.75, NAN, 0.0, 0.75])
    assert rank([]).shape == (0,)


@given(
    st.lists(st.floats(-9, 9), min_size=1, max_size=5),
    st.lists(st.floats(-9, 9), min_size=1, max_size=5),
    st.floats(0.1, 3),
)
def test_par_is_the_mean_sigmoid(scores, references, slope):
    expected = [np.mean([1 / (1 + np.exp(-slope * (s - r))) for r in references]) for s in scores]
    np.testing.assert_allclose(par(scores, references, slope), expected)
    np.testing.assert_allclose(par(scores, [*references, NAN], slope), expected)


def test_par_without_references_says_nothing():
    np.testing.assert_array_equal(par([3.0, NAN], []), [0.5, NAN])
    np.testing.assert_array_equal(par([3.0], [NAN]), [0.5])
    np.testing.assert_array_equal(RewardShape("par").apply(np.array([3.0])), [0.5])


def test_the_references_of_a_candidate_are_the_others():
    scores = np.array([0.0, 1.0, 5.0])
    expected = [par([s], np.delete(scores, i))[0] for i, s in enumerate(scores)]
    np.testing.assert_allclose(RewardShape("par").apply(scores), expected)
    # More references than there are: all of them.
    np.testing.assert_allclose(RewardShape("par", references=9).apply(scores), expected)
    # One reference: the middle of the others.
    one = RewardShape("par", references=1).apply(np.array([0.0, 1.0, 2.0, 50.0]))
    np.testing.assert_allclose(one[3], par([50.0], [1.0])[0])


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9), st.floats(0, 1))
def test_no_score_exceeds_the_cap(scores, at):
    np.testing.assert_array_equal(cap(scores, at), np.minimum(scores, np.quantile(scores, at)))


def test_the_cap_of_extreme_scores():
    np.testing.assert_array_equal(cap([-np.inf, 1.0], 0.5), [-np.inf, -np.inf])
    np.testing.assert_array_equal(cap([-1e308, 1e308], 0.5), [-1e308, 0.0])
    np.testing.assert_array_equal(cap([NAN, NAN], 0.5), [NAN, NAN])
    for at in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match="at: "):
            cap([1.0], at)


@given(st.lists(st.floats(-1e308, 1e308), min_size=2, max_size=9))
def test_standardized_scores_have_mean_0_and_deviation_1(scores):
    shaped = standardize(scores)
    if len(set(scores)) == 1:
        np.testing.assert_array_equal(shaped, np.zeros(len(scores)))
    elif np.ptp(np.array(scores) / 4) > 1e-6 * np.abs(np.array(scores) / 4).max():
        assert shaped.mean() == pytest.approx(0, abs=1e-6)
        assert shaped.std() == pytest.approx(1, abs=1e-6)


def test_infinite_scores_do_not_move_the_others():
    np.testing.assert_allclose(standardize([1.0, 3.0, -np.inf, NAN]), [-1, 1, -np.inf, NAN])


def test_shortfalls_are_in_deviations_of_their_reward():
    safe = [0.0, 1.0, 2.0, NAN]
    brief = [-100.0, -300.0, -500.0, -100.0]
    deviation = np.std([0.0, 1.0, 2.0])
    missed = shortfalls([safe, brief], [1.0, -400.0])
    expected = [1 / deviation, 0.0, 100 / np.std(brief), NAN]
    np.testing.assert_allclose(missed, expected)
    np.testing.assert_allclose(shortfalls([[2.0, 2.0]], [3.0]), [1.0, 1.0])
    with pytest.raises(ValueError, match="must be"):
        shortfalls([[1.0]], [1.0, 2.0])


@pytest.mark.parametrize(
    "function", [rank, standardize, lambda s: cap(s, 0.5), lambda s: par(s, [0])]
)
def test_other_shapes_of_scores_are_refused(function):
    with pytest.raises(ValueError, match=r"must be \[N\]"):
        function([[1.0]])
