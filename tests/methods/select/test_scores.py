"""Selection from scores: groups, orders of importance, lotteries, length, consensus."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.methods.select import (
    consensus,
    lexicographic,
    maxmin,
    overlap,
    pessimistic,
    shortest,
    tilted,
)

NAN = np.nan
EXTREME = st.sampled_from([0.0, 1.0, -3.0, 1e308, -1e308, -np.inf, 1e-308, NAN])
SCORES = st.lists(st.floats(-5, 5) | EXTREME, max_size=9).map(np.array)
TABLES = st.integers(0, 6).flatmap(
    lambda n: st.lists(
        st.lists(st.floats(-5, 5) | EXTREME, min_size=n, max_size=n), min_size=1, max_size=3
    ).map(lambda rows: np.array(rows).reshape(len(rows), -1))
)
BETAS = st.sampled_from([1e-300, 0.01, 0.1, 1.0, 100.0, 1e300])
LOTTERIES = pytest.mark.parametrize("lottery", [pessimistic, tilted])
pytestmark = pytest.mark.filterwarnings("error")


def shuffled(n, random):
    order = list(range(n))
    random.shuffle(order)
    return order


@LOTTERIES
@given(scores=SCORES, beta=BETAS, random=st.randoms(use_true_random=False))
def test_a_lottery_is_a_distribution_that_moves_with_its_candidates(lottery, scores, beta, random):
    q = lottery(scores, beta)
    assert q.shape == scores.shape
    assert (q >= 0).all()
    assert q.sum() == pytest.approx(0.0 if np.isnan(scores).all() else 1.0)
    assert (q[np.isnan(scores)] == 0).all()
    order = shuffled(len(scores), random)
    np.testing.assert_allclose(lottery(scores[order], beta), q[order], atol=1e-12)


@LOTTERIES
@given(scores=SCORES, beta=BETAS)
def test_a_higher_score_never_gets_less(lottery, scores, beta):
    q = lottery(scores, beta)
    scored = ~np.isnan(scores)
    order = np.argsort(scores[scored], kind="stable")
    assert (np.diff(q[scored][order]) >= -1e-12).all()


@LOTTERIES
def test_a_small_beta_is_argmax_and_a_large_one_is_uniform(lottery):
    np.testing.assert_allclose(lottery([1.0, 3.0, 2.0], 1e-6), [0, 1, 0])
    np.testing.assert_allclose(lottery([1.0, 3.0, 2.0], 1e6), [1 / 3] * 3, atol=1e-5)


@LOTTERIES
@pytest.mark.parametrize(("scores", "beta"), [([1.0], 0.0), ([1.0], -1.0), ([1.0], NAN), (1.0, 1)])
def test_a_beta_that_is_no_width_is_refused(lottery, scores, beta):
    with pytest.raises(ValueError, match="must be"):
        lottery(scores, beta)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9), st.floats(0.05, 5))
def test_pessimism_solves_its_equation(scores, beta):
    q = pessimistic(scores, beta)
    values = np.array(scores)
    (support,) = np.nonzero(q)
    levels = values[support] - q[support] * beta * len(values)
    np.testing.assert_allclose(levels, levels[0], atol=1e-9)
    assert (values[q == 0] <= levels[0] + 1e-9).all()


def test_tilted_is_the_softmax():
    np.testing.assert_allclose(tilted([0.0, np.log(3.0)], 1.0), [0.25, 0.75])


@given(TABLES, st.booleans())
def test_maxmin_maximises_the_worst_group_and_never_takes_a_nan(utilities, regret):
    best = maxmin(utilities, regret)
    compared = ~np.isnan(utilities).any(axis=0)
    if not compared.any():
        assert best is None
        return
    assert compared[best]
    rows = utilities[:, compared] / 4
    with np.errstate(invalid="ignore"):
        losses = np.nan_to_num(rows.max(axis=1, keepdims=True) - rows, nan=0.0, posinf=np.inf)
    worst = -losses.max(axis=0) if regret else rows.min(axis=0)
    assert worst[np.flatnonzero(compared) == best] == worst.max()


def test_maxmin_and_regret_differ_and_ties_go_to_the_second_worst_group():
    utilities = [[0.0, 1.0, 2.0], [10.0, 5.0, 1.5]]
    assert maxmin(utilities) == 2
    assert maxmin(utilities, regret=True) == 0
    assert maxmin([[1.0, 1.0, 1.0], [2.0, 3.0, 3.0]]) == 1
    assert maxmin([[], []]) is None
    with pytest.raises(ValueError, match=r"\[G, N\]"):
        maxmin([1.0])


@pytest.mark.slow
@given(TABLES, st.sampled_from([0.0, 0.25, 1.0, np.inf]), st.randoms(use_true_random=False))
def test_lexicographic_wins_move_with_their_candidates(scores, margin, random):
    margins = [margin] * len(scores)
    wins = lexicographic(scores, margins)
    np.testing.assert_array_equal(np.isnan(wins), np.isnan(scores).any(axis=0))
    order = shuffled(scores.shape[1], random)
    np.testing.assert_array_equal(lexicographic(scores[:, order], margins), wins[order])


def test_the_first_reward_that_differs_enough_decides():
    safe = [0.0, 1.0, 1.01, NAN]
    brief = [9.0, 2.0, 1.0, 9.0]
    np.testing.assert_array_equal(lexicographic([safe, brief], [0.25, 0.0]), [0, 2, 1, NAN])
    np.testing.assert_array_equal(lexicographic([safe, brief], [0.0, 0.0]), [0, 1, 2, NAN])
    # A margin over everything leaves the decision to the next reward.
    np.testing.assert_array_equal(lexicographic([safe, brief], [99.0, 0.0]), [2, 1, 0, NAN])


@pytest.mark.parametrize(("scores", "margins"), [([1.0], [1.0]), ([[1.0]], []), ([[1.0]], [-1.0])])
def test_lexicographic_refuses_other_shapes_and_negative_margins(scores, margins):
    with pytest.raises(ValueError, match="must be"):
        lexicographic(scores, margins)


def test_the_shortest_near_the_best():
    scores = [3.0, 2.9, 2.0, NAN]
    lengths = [20, 12, 1, 0]
    assert shortest(scores, lengths, 0.2) == 1
    assert shortest(scores, lengths, 0.0) == 0
    assert shortest(scores, lengths, 5.0) == 2
    assert shortest([1.0, 2.0, 2.0], [3, 3, 3], 5.0) == 1
    assert shortest([NAN, NAN], [1, 1], 0.0) is None
    assert shortest([], [], 0.0) is None
    assert shortest([1e308, -1e308, -np.inf], [9, 1, 1], 1.0) == 0
    with pytest.raises(ValueError, match="must be"):
        shortest([1.0], [1, 2], 0.1)
    with pytest.raises(ValueError, match="must be"):
        shortest([1.0], [1], NAN)


def test_consensus_is_the_mean_likeness_to_the_others():
    similarities = overlap(["Owls eat mice.", "owls EAT voles", "Bats"])
    np.testing.assert_allclose(similarities, [[1, 2 / 3, 0], [2 / 3, 1, 0], [0, 0, 1]])
    np.testing.assert_allclose(consensus(similarities), [1 / 3, 1 / 3, 0])
    assert np.isnan(consensus([[1.0]])).all()
    assert consensus([]).shape == (0,)
    np.testing.assert_allclose(consensus([[9, NAN, 1], [NAN, 9, NAN], [1, NAN, 9]]), [1, NAN, 1])
    with pytest.raises(ValueError, match=r"\[N, N\]"):
        consensus([[1.0, 2.0]])


def test_texts_without_words_are_like_none():
    np.testing.assert_array_equal(overlap(["", "..."]), np.eye(2))


def test_words_overlap_in_every_script():
    assert overlap(["答案是四十二。", "四十二"])[0, 1] == pytest.approx(2 * 3 / 9)
    assert overlap(["👍", "👎"])[0, 1] == 0
