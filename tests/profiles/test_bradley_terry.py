from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from infer_align.profiles import fit, next_question

NUMBERS = st.floats(-1e3, 1e3)
ANY_NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


def rows(elements: st.SearchStrategy[float], columns: int = 3, size: int = 12):
    row = st.lists(elements, min_size=columns, max_size=columns)
    return st.lists(row, max_size=size)


def random_choices(weights: np.ndarray, choices: int, seed: int) -> np.ndarray:
    """Return the differences of choices that a user with these weights makes."""
    generator = np.random.default_rng(seed)
    differences = generator.normal(size=(choices, len(weights)))
    prefers = generator.random(choices) < expit(differences @ weights)
    return np.where(prefers[:, None], differences, -differences)


def test_no_choice_leaves_the_prior() -> None:
    covariance = np.array([[2.0, 0.5], [0.5, 1.0]])
    mean, spread = fit([], [1.0, -2.0], covariance)
    np.testing.assert_allclose(mean, [1.0, -2.0])
    np.testing.assert_allclose(spread, covariance)


@pytest.mark.parametrize("seed", range(5))
def test_the_mean_is_the_maximum_of_the_posterior(seed: int) -> None:
    generator = np.random.default_rng(seed)
    differences = random_choices(np.array([1.0, -0.5, 0.0]), 20, seed)
    root = generator.normal(size=(3, 3))
    prior_mean, prior = generator.normal(size=3), root @ root.T + 0.1 * np.eye(3)
    precision = np.linalg.inv(prior)

    def loss(w: np.ndarray) -> float:
        centred = w - prior_mean
        misfit = np.logaddexp(0, -(differences @ w)).sum()
        return float(centred @ precision @ centred / 2 + misfit)

    mean, covariance = fit(differences, prior_mean, prior)
    reference = minimize(loss, prior_mean, method="BFGS", options={"gtol": 1e-8})
    np.testing.assert_allclose(mean, reference.x, atol=1e-5)
    p = expit(differences @ mean)
    hessian = precision + (differences * (p * (1 - p))[:, None]).T @ differences
    np.testing.assert_allclose(covariance, np.linalg.inv(hessian), rtol=1e-6, atol=1e-12)


def test_many_choices_recover_the_weights() -> None:
    weights = np.array([1.5, -0.7, 0.0, 0.3])
    mean, covariance = fit(random_choices(weights, 5000, 3), np.zeros(4), np.eye(4))
    deviations = (mean - weights) / np.sqrt(np.diag(covariance))
    assert np.abs(deviations).max() < 4
    assert np.sqrt(np.diag(covariance)).max() < 0.1


def test_separable_choices_have_a_finite_maximum() -> None:
    differences = np.abs(np.random.default_rng(0).normal(size=(50, 3)))
    for factor in (1.0, 1e3, 1e150, 1e307):
        mean, covariance = fit(differences * factor, np.zeros(3), np.eye(3))
        assert np.isfinite(mean).all()
        assert (mean > 0).all()
        assert np.linalg.eigvalsh(covariance).min() >= 0


def test_contradictory_choices_cancel() -> None:
    row = np.array([1.0, 2.0, -1.0])
    for factor in (1.0, 1e8, 1e300):
        mean, _ = fit([row * factor, -row * factor], np.zeros(3), np.eye(3))
        np.testing.assert_allclose(mean, 0.0, atol=1e-8)


def test_a_row_that_compares_nothing_is_left_out() -> None:
    mean, covariance = fit([[np.nan, 1.0], [np.inf, 0.0], [1.0, 0.0]], [0.0, 0.0], np.eye(2))
    expected = fit([[1.0, 0.0]], [0.0, 0.0], np.eye(2))
    np.testing.assert_array_equal(mean, expected[0])
    np.testing.assert_array_equal(covariance, expected[1])


def test_rows_of_zeros_teach_nothing() -> None:
    mean, covariance = fit(np.zeros((9, 2)), [0.3, 0.1], np.eye(2))
    np.testing.assert_allclose(mean, [0.3, 0.1])
    np.testing.assert_allclose(covariance, np.eye(2))


def test_a_weight_without_variance_stays_as_it_is() -> None:
    mean, covariance = fit([[1.0, 1.0]] * 10, [0.5, 0.5], np.diag([0.0, 1.0]))
    assert mean[0] == 0.5
    assert mean[1] > 0.6
    assert covariance[0, 0] == 0


@settings(max_examples=60, deadline=None)
@given(rows(ANY_NUMBERS), st.lists(NUMBERS, min_size=3, max_size=3), st.floats(1e-6, 1e6))
def test_the_fit_is_finite_whatever_the_rows_are(differences, prior_mean, variance) -> None:
    mean, covariance = fit(differences, prior_mean, variance * np.eye(3))
    assert np.isfinite(mean).all()
    assert np.isfinite(covariance).all()
    # No choice makes a weight less certain than the prior.
    assert (np.diag(covariance) <= variance * (1 + 1e-9)).all()


@settings(max_examples=30, deadline=None)
@given(rows(st.floats(-10, 10)), st.randoms())
def test_the_order_of_the_choices_does_not_matter(differences, random) -> None:
    shuffled = list(differences)
    random.shuffle(shuffled)
    first, _ = fit(differences, np.zeros(3), np.eye(3))
    second, _ = fit(shuffled, np.zeros(3), np.eye(3))
    np.testing.assert_allclose(first, second, atol=1e-7)


@pytest.mark.parametrize(
    ("mean", "covariance"),
    [
        ([0.0], np.eye(2)),
        ([[0.0]], np.eye(1)),
        ([np.nan], np.eye(1)),
        ([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]),
        ([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]]),
    ],
)
def test_a_prior_that_is_no_distribution_is_refused(mean, covariance) -> None:
    with pytest.raises(ValueError, match=r"mean|covariance"):
        fit([], mean, covariance)


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"differences \(1, 3\): must be \[C, 2\]"):
        fit([[1.0, 2.0, 3.0]], [0.0, 0.0], np.eye(2))


@pytest.mark.parametrize("seed", range(4))
def test_the_question_is_the_pair_with_the_most_information(seed: int) -> None:
    generator = np.random.default_rng(seed)
    candidates = generator.normal(size=(7, 3))
    root = generator.normal(size=(3, 3))
    mean, covariance = generator.normal(size=3), root @ root.T
    best = (-1.0, (0, 0))
    for i in range(7):
        for j in range(i + 1, 7):
            d = candidates[i] - candidates[j]
            p = expit(mean @ d)
            best = max(best, (p * (1 - p) * (d @ covariance @ d), (i, j)))
    assert next_question(candidates, mean, covariance) == best[1]


@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.randoms(use_true_random=False))
def test_the_question_follows_its_candidates(seed: int, n: int, random) -> None:
    generator = np.random.default_rng(seed)
    candidates = generator.normal(size=(n, 3))
    mean = generator.normal(size=3)
    order = random.sample(range(n), n)
    first, second = next_question(candidates, mean, np.eye(3))
    moved = next_question(candidates[order], mean, np.eye(3))
    assert {order[i] for i in moved} == {first, second}


def test_a_candidate_without_a_score_is_not_asked_about() -> None:
    candidates = [[np.nan, 0.0], [0.0, 0.0], [9.0, np.inf], [0.1, 0.0]]
    assert next_question(candidates, [0.0, 0.0], np.eye(2)) == (1, 3)
    with pytest.raises(ValueError, match="1 of 2 have all their scores"):
        next_question([[np.nan], [1.0]], [0.0], np.eye(1))


def test_equal_candidates_give_the_first_pair() -> None:
    assert next_question(np.ones((4, 2)), [1.0, 1.0], np.eye(2)) == (0, 1)


def test_a_certain_comparison_is_not_asked() -> None:
    # The first pair differs most, but its outcome is known.
    assert next_question([[1e300], [0.0], [0.5]], [1.0], np.eye(1)) == (1, 2)
