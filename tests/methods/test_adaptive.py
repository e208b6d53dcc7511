"""The expected gain of one more batch, and the rule that ends the drawing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtri

from infer_align.methods import PlanDraft
from infer_align.methods.adaptive import Adaptive, ExpectedGain, expected_gain
from infer_align.types import Array, Draw

# Multiples of 1/8: their sums and their multiples by powers of two are exact.
SCORES = st.lists(st.integers(-400, 400).map(lambda k: k / 8), min_size=2, max_size=40)
BATCHES = st.integers(1, 64)


def simulated_gain(scores: Array, batch: int, samples: int) -> tuple[float, float]:
    """Return the gain under the posterior by simulation, and its standard error."""
    rng = np.random.default_rng(5)
    n = len(scores)
    deviations = np.sqrt(((scores - scores.mean()) ** 2).sum() / rng.chisquare(n, samples))
    means = scores.mean() + deviations * rng.normal(size=samples) / math.sqrt(n)
    best = means + deviations * ndtri(rng.random(samples) ** (1 / batch))
    gains = np.maximum(best - scores.max(), 0.0) / scores.std(ddof=1)
    return float(gains.mean()), float(gains.std() / math.sqrt(samples))


@pytest.mark.parametrize(("n", "batch"), [(3, 1), (4, 4), (8, 4), (64, 16), (500, 1)])
def test_the_gain_is_that_of_draws_from_the_posterior(n: int, batch: int) -> None:
    scores = np.random.default_rng(n).normal(3.0, 0.2, n)
    simulated, error = simulated_gain(scores, batch, 400_000)
    assert expected_gain(scores, batch) == pytest.approx(simulated, abs=4 * error + 1e-4)


def test_with_many_scores_it_is_the_gain_under_a_known_normal() -> None:
    scores = ndtri((np.arange(20_000) + 0.5) / 20_000)
    scores = scores[scores < 1.5]
    margin = (1.5 - scores.mean()) / scores.std()
    density = math.exp(-(margin**2) / 2) / math.sqrt(2 * math.pi)
    one_draw = density - margin * math.erfc(margin / math.sqrt(2)) / 2
    assert expected_gain([*scores, 1.5], 1) == pytest.approx(one_draw, rel=0.01)


def test_few_scores_promise_more_than_a_normal_that_is_fitted_to_them() -> None:
    # Both have a margin of 1.5 deviations, from 4 and from 400 scores.
    few = np.array([0.0, 0.0, 0.0, 1.0])
    many = np.concatenate([[1.5], np.tile([-1.0, 1.0], 200)])
    assert expected_gain(few, 4) > 1.3 * expected_gain(many, 4)


@pytest.mark.slow
@given(SCORES, BATCHES, st.integers(-50, 50), st.integers(-3, 3))
def test_shift_and_scale_do_not_matter(
    scores: list[float], batch: int, shift: int, exponent: int
) -> None:
    moved = [2.0**exponent * score + shift for score in scores]
    assert expected_gain(moved, batch) == pytest.approx(expected_gain(scores, batch), abs=1e-9)


@pytest.mark.slow
@given(SCORES, BATCHES)
def test_order_does_not_matter_and_missing_scores_are_left_out(
    scores: list[float], batch: int
) -> None:
    shuffled = [math.nan, *reversed(scores), math.nan, math.inf]
    assert expected_gain(shuffled, batch) == pytest.approx(expected_gain(scores, batch), abs=1e-12)


@pytest.mark.slow
@given(SCORES, BATCHES, st.integers(1, 400))
def test_the_gain_falls_with_the_margin_of_the_best(
    scores: list[float], batch: int, eighths: int
) -> None:
    best = scores.index(max(scores))
    better = list(scores)
    better[best] += eighths / 8
    if len(set(scores)) > 1:
        assert expected_gain(better, batch) <= expected_gain(scores, batch) + 1e-9


@pytest.mark.slow
@given(SCORES, BATCHES)
def test_a_larger_batch_gains_more(scores: list[float], batch: int) -> None:
    gain = expected_gain(scores, batch)
    assert 0.0 <= gain <= expected_gain(scores, batch + 1) + 1e-12
    assert math.isfinite(gain)


def test_the_gain_falls_while_draws_add_up() -> None:
    scores = np.random.default_rng(1).normal(size=256)
    gains = [expected_gain(scores[:n], 4) for n in (4, 16, 64, 256)]
    assert gains == sorted(gains, reverse=True)


@pytest.mark.parametrize("scores", [[], [1.0], [math.nan, 1.0], [math.nan] * 5])
def test_fewer_than_two_scores_promise_anything(scores: list[float]) -> None:
    assert expected_gain(scores, 4) == math.inf


@pytest.mark.parametrize("score", [0.0, 0.1, -1e300])
def test_equal_scores_promise_nothing(score: float) -> None:
    assert expected_gain([score] * 7, 4) == 0.0


def test_scores_of_any_size_are_finite() -> None:
    scores = np.array([0.25, 0.5, 1.0])
    expected = expected_gain(scores, 2)
    for factor in (1e300, 1.7e308, 1e-300):
        assert expected_gain(factor * scores, 2) == pytest.approx(expected)
    assert math.isfinite(expected_gain(scores, 10**9))


@pytest.mark.parametrize(
    ("scores", "batch", "message"),
    [([[1.0, 2.0]], 4, r"must be \[N\]"), ([1.0, 2.0], 0, "batch: 0"), (3.0, 1, r"must be \[N\]")],
)
def test_bad_input_is_named(scores: list[float], batch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expected_gain(scores, batch)


def test_the_rule_stops_below_the_cost_and_says_so() -> None:
    objective = np.random.default_rng(2).normal(size=12)
    gain = expected_gain(objective, 4)
    assert ExpectedGain(64, 4, gain).reason_to_stop(objective) is None
    reason = ExpectedGain(64, 4, gain * 1.01).reason_to_stop(objective)
    assert reason is not None
    assert f"of 4 more is {gain:.3g} standard deviations" in reason


def test_the_rule_counts_the_draws_that_are_usually_lost() -> None:
    objective = np.full(12, math.nan)
    objective[::2] = np.random.default_rng(3).normal(size=6)
    half = expected_gain(objective, 2)
    assert ExpectedGain(64, 4, half * 0.99).reason_to_stop(objective) is None
    assert ExpectedGain(64, 4, half * 1.01).reason_to_stop(objective) is not None


def test_the_rule_expects_less_where_the_best_score_repeats() -> None:
    rule = ExpectedGain(64, 4, 0.05)
    distinct = np.array([0.0, 1.0, 2.0, 3.0, 3.5, 4.0])
    assert rule.gain(distinct) == expected_gain(distinct, 4)
    ceiling = np.array([0.0, 1.0, 4.0, 4.0, 4.0, 4.0 - 1e-7])
    assert rule.gain(ceiling) == expected_gain(ceiling, 1)
    lower_ties = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 4.0])
    assert rule.gain(lower_ties) == expected_gain(lower_ties, 4)


@pytest.mark.parametrize("compared", [0, 1])
def test_the_rule_goes_on_while_there_is_nothing_to_compare(compared: int) -> None:
    objective = np.full(4, math.nan)
    objective[:compared] = 1.0
    assert ExpectedGain(64, 4, 0.05).reason_to_stop(objective) is None


def test_the_plan_is_continued_in_batches() -> None:
    draft = Adaptive(max_n=12, batch=3, cost=0.1).apply(PlanDraft(draws=(Draw(body={}),)))
    assert draft.selects
    assert draft.draws[0].n == 1
    assert draft.stop_rule == ExpectedGain(12, 3, 0.1)
    assert draft.note == ""
    greedy = Adaptive().apply(PlanDraft(draws=(Draw(body={"temperature": 0}),)))
    assert "temperature" in greedy.note
