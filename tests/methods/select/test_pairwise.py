"""Win rates, the Condorcet winner and the minimax lottery, as properties of matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from infer_align.methods.select import (
    condorcet,
    cycles,
    minimax_lottery,
    preferences,
    win_rates,
)

NAN = np.nan
ROCK_PAPER_SCISSORS = np.array([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]])


def matrices(entries, largest=7):
    """Return a strategy of matrices of win probabilities."""

    def build(n):
        pairs = n * (n - 1) // 2
        return st.lists(entries, min_size=pairs, max_size=pairs).map(lambda row: filled(n, row))

    return st.integers(1, largest).flatmap(build)


def filled(n, upper):
    p = np.full((n, n), 0.5)
    rows, columns = np.triu_indices(n, 1)
    p[rows, columns] = upper
    p[columns, rows] = 1 - np.asarray(upper)
    return p


ANY = matrices(st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0]))
# Ties and missing pairs everywhere.
COARSE = matrices(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
HOLES = matrices(st.sampled_from([0.0, 0.5, 0.75, 1.0, NAN]))


def moved(p, random):
    order = list(range(len(p)))
    random.shuffle(order)
    return p[np.ix_(order, order)], order


@pytest.mark.slow
@given(HOLES, st.randoms(use_true_random=False))
def test_win_rates_move_with_their_candidates(p, random):
    other, order = moved(p, random)
    np.testing.assert_allclose(win_rates(other), win_rates(p)[order])


def test_a_win_rate_is_the_mean_over_the_compared_pairs():
    p = filled(3, [1.0, NAN, 0.25])
    np.testing.assert_allclose(win_rates(p), [1.0, 0.125, 0.75])


@given(ANY)
def test_win_rates_average_to_one_half(p):
    if len(p) > 1:
        assert win_rates(p).mean() == pytest.approx(0.5)


@given(HOLES, st.randoms(use_true_random=False))
def test_the_condorcet_winner_moves_with_its_candidates(p, random):
    other, order = moved(p, random)
    winner = condorcet(other)
    assert (None if winner is None else order[winner]) == condorcet(p)


@given(ANY)
def test_a_condorcet_winner_beats_every_other_one(p):
    winner = condorcet(p)
    if winner is not None:
        assert (np.delete(p[winner], winner) > 0.5).all()
    else:
        assert all((np.delete(row, i) <= 0.5).any() for i, row in enumerate(p))


def test_an_unknown_pair_is_no_win_and_an_unknown_candidate_no_rival():
    assert condorcet(filled(3, [1.0, NAN, 1.0])) is None
    assert condorcet(filled(3, [1.0, NAN, NAN])) == 0
    assert condorcet(filled(2, [NAN])) is None


@given(ANY)
def test_a_condorcet_winner_takes_the_whole_lottery(p):
    winner = condorcet(p)
    if winner is not None:
        np.testing.assert_array_equal(minimax_lottery(p), np.eye(len(p))[winner])


@pytest.mark.slow
@settings(max_examples=50)
@given(ANY | COARSE)
def test_the_lottery_has_the_best_worst_case(p):
    q = minimax_lottery(p)
    assert q.min() >= 0
    assert q.sum() == pytest.approx(1)
    # The value of the game by the textbook program.
    n = len(p)
    bounds = [(0, None)] * n + [(None, None)]
    column = np.ones((n, 1))
    total = np.ones((1, n + 1))
    total[0, -1] = 0
    best = linprog([0] * n + [-1], np.hstack([-p.T, column]), np.zeros(n), total, [1], bounds)
    assert (q @ p).min() == pytest.approx(best.x[-1], abs=1e-5)


@settings(max_examples=50)
@given(COARSE | HOLES, st.randoms(use_true_random=False))
def test_the_lottery_moves_with_its_candidates(p, random):
    other, order = moved(p, random)
    np.testing.assert_allclose(minimax_lottery(other), minimax_lottery(p)[order], atol=1e-7)


def test_known_lotteries():
    np.testing.assert_allclose(minimax_lottery(ROCK_PAPER_SCISSORS), [1 / 3] * 3)
    np.testing.assert_allclose(minimax_lottery(np.full((4, 4), 0.5)), [0.25] * 4)
    # A loser to all three of a cycle gets nothing.
    four = np.full((4, 4), 0.0)
    four[:3, :3] = ROCK_PAPER_SCISSORS
    four[:3, 3] = 1.0
    four[3, 3] = 0.5
    np.testing.assert_allclose(minimax_lottery(four), [1 / 3, 1 / 3, 1 / 3, 0], atol=1e-9)


def test_a_copy_shares_the_probability_of_its_original_and_changes_no_other():
    copied = [0, 1, 2, 2]
    q = minimax_lottery(ROCK_PAPER_SCISSORS[np.ix_(copied, copied)])
    np.testing.assert_allclose(q, [1 / 3, 1 / 3, 1 / 6, 1 / 6])


def test_large_tournaments_of_any_kind_are_solved():
    generator = np.random.default_rng(5)
    for n in (9, 33, 64):
        for upper in (
            generator.random(n * (n - 1) // 2),
            generator.integers(0, 2, n * (n - 1) // 2).astype(float),
            0.5 + generator.normal(size=n * (n - 1) // 2) * 1e-4,
        ):
            p = filled(n, upper)
            q = minimax_lottery(p)
            assert q.sum() == pytest.approx(1)
            assert (q @ p).min() > 0.5 - 1e-5


def test_a_candidate_without_comparisons_gets_nothing():
    p = np.full((3, 3), NAN)
    p[:2, :2] = filled(2, [0.5])
    np.testing.assert_allclose(minimax_lottery(p), [0.5, 0.5, 0.0])
    np.testing.assert_array_equal(minimax_lottery(np.full((3, 3), NAN)), [0, 0, 0])


def test_no_candidate_and_one_candidate():
    for empty in ([], np.zeros((0, 0))):
        assert win_rates(empty).shape == (0,)
        assert condorcet(empty) is None
        assert minimax_lottery(empty).shape == (0,)
        assert cycles(empty) == 0
    for single in ([[0.5]], [[NAN]]):
        assert np.isnan(win_rates(single)).all()
        assert condorcet(single) == 0
        np.testing.assert_array_equal(minimax_lottery(single), [1.0])


@pytest.mark.parametrize("function", [win_rates, condorcet, cycles, minimax_lottery])
@pytest.mark.parametrize(
    "p", [[0.5], [[0.5, 0.5]], [[0.5, 0.7], [0.7, 0.5]], [[0.5, 2.0], [-1.0, 0.5]]]
)
def test_what_is_no_matrix_of_win_probabilities_is_refused(function, p):
    with pytest.raises(ValueError, match=r"^p: "):
        function(p)


def test_cycles_are_counted_once():
    assert cycles(ROCK_PAPER_SCISSORS) == 1
    assert cycles(filled(4, [0.9] * 6)) == 0


def test_preferences_are_the_weighted_share_of_rewards():
    p = preferences([[1.0, 2.0, NAN], [5.0, 5.0, 1e308], [3.0, -np.inf, 0.0]], [1.0, 1.0, 2.0])
    expected = [[0.5, 2.5 / 4, 2 / 3], [1.5 / 4, 0.5, 0.0], [1 / 3, 1.0, 0.5]]
    np.testing.assert_allclose(p, expected)


def test_a_pair_that_no_reward_has_is_not_compared():
    p = preferences([[1.0, NAN], [NAN, 2.0]], [1.0, 1.0])
    np.testing.assert_array_equal(p, [[0.5, NAN], [NAN, 0.5]])


@pytest.mark.parametrize(("values", "weights"), [([1.0], [1.0]), ([[1.0]], [-1.0]), ([[1.0]], [])])
def test_preferences_refuse_other_shapes_and_negative_weights(values, weights):
    with pytest.raises(ValueError, match="must be"):
        preferences(values, weights)
