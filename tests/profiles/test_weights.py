from __future__ import annotations

import numpy as np
import pytest

from infer_align.profiles.weights import learn, spreads_of

OPTIONS = {"deviation": 1.0, "bound": 3.0}


def learned(differences, prior, known=None, **options):
    rows = np.asarray(differences, dtype=np.float64).reshape(-1, len(prior))
    start = np.asarray(prior, dtype=np.float64)
    spreads = spreads_of(rows, known or [None] * len(prior), start)
    return learn(rows, start, spreads, **{**OPTIONS, **options})


def test_without_choices_the_weights_are_the_prior_ones() -> None:
    result = learned([], [2.0, 0.5])
    assert result.weights.tolist() == [2.0, 0.5]
    assert result.choices == 0
    assert np.isnan(result.deviations).all()


def test_a_choice_moves_each_weight_the_way_it_points() -> None:
    result = learned([[1.0, -0.2]], [1.0, 1.0], known=[1.0, 0.2])
    assert result.weights[0] > 1.0
    assert result.weights[1] < 1.0


def test_the_scale_of_a_reward_does_not_matter() -> None:
    rows = np.random.default_rng(0).normal(size=(12, 2))
    plain = learned(rows, [1.0, 1.0])
    scaled = learned(rows * [1.0, 1000.0], [1.0, 0.001])
    np.testing.assert_allclose(scaled.weights, plain.weights * [1.0, 0.001], rtol=1e-6)
    np.testing.assert_allclose(scaled.deviations, plain.deviations * [1.0, 0.001], rtol=1e-6)


def test_a_reward_that_never_differs_keeps_its_weight() -> None:
    result = learned([[1.0, 0.0], [0.5, 1e-9]], [1.0, 7.0])
    assert result.weights[1] == 7.0
    assert np.isnan(result.deviations[1])
    assert np.isnan(result.low[1])


def test_the_weights_stay_within_the_bounds() -> None:
    rows = np.abs(np.random.default_rng(1).normal(size=(200, 2))) + 1
    result = learned(rows, [1.0, 1.0], bound=1.5, deviation=100.0)
    assert (result.weights <= result.high + 1e-12).all()
    assert (result.weights >= result.low - 1e-12).all()
    np.testing.assert_allclose(result.weights, result.high)


def test_a_spread_that_is_too_small_to_be_believed_gives_no_enormous_weight() -> None:
    # The two answers differ by one word, by chance.
    result = learned([[0.5, 0.001]], [1.0, 1.0])
    assert 1.0 < result.weights[1] < 1.1
    # With a configured spread it is believed.
    assert learned([[0.5, 0.001]], [1.0, 1.0], known=[None, 0.001]).weights[1] > 10


def test_a_weight_keeps_its_sign_if_it_has_to() -> None:
    rows = [[-2.0, -0.1, -0.1]] * 30
    free = learned(rows, [0.5, 0.0, -0.5])
    assert free.weights[0] < 0
    kept = learned(rows, [0.5, 0.0, -0.5], keeps_sign=np.array([True, True, True]))
    assert kept.weights[0] == kept.low[0] == pytest.approx(0.005)
    assert kept.weights[1] < 0
    assert kept.weights[2] < -0.5
    assert kept.high[2] == pytest.approx(-0.005)


def test_choices_without_a_score_are_counted_out() -> None:
    assert learned([[np.nan, 1.0], [1.0, 1.0]], [1.0, 1.0]).choices == 1


def test_more_choices_make_the_weights_more_certain() -> None:
    rows = np.random.default_rng(2).normal(size=(64, 2))
    few = learned(rows[:4], [1.0, 1.0], known=[1.0, 1.0])
    many = learned(rows, [1.0, 1.0], known=[1.0, 1.0])
    assert (many.deviations < few.deviations).all()


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e200])
def test_spreads_are_those_of_one_answer(scale: float) -> None:
    rows = np.array([[2.0], [-2.0], [np.nan]]) * scale
    np.testing.assert_allclose(spreads_of(rows, [None], np.ones(1)), [np.sqrt(2) * scale])


def test_a_weight_that_is_nothing_beside_another_keeps_all_numbers_finite() -> None:
    prior = np.array([1e9, 1e-320])
    differences = np.array([[2.0, 1.0]])
    spreads = spreads_of(differences, [None, None], prior)
    assert np.isfinite(spreads).all()
    assert np.isfinite(learn(differences, prior, spreads, deviation=1.0, bound=3.0).weights).all()
