"""Means and correlations over prompts, against direct computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from infer_align.diagnostics.statistics import (
    clustered_mean,
    correlation,
    error_correlations,
    mean_over_prompts,
    member_correlations,
    within_prompts,
)

VALUES = st.lists(st.floats(-10, 10), min_size=2, max_size=12)


@given(VALUES)
def test_one_value_per_prompt_has_the_usual_standard_error(values: list[float]) -> None:
    statistic = mean_over_prompts(values)
    assert statistic.value == pytest.approx(np.mean(values), abs=1e-9)
    usual = np.std(values, ddof=1) / math.sqrt(len(values))
    assert statistic.error == pytest.approx(usual, abs=1e-9)
    assert (statistic.count, statistic.prompts) == (len(values), len(values))


@given(VALUES, st.integers(2, 5))
def test_copies_of_an_answer_do_not_shrink_the_error(values: list[float], copies: int) -> None:
    once = mean_over_prompts(values)
    prompts = np.repeat(np.arange(len(values)), copies)
    repeated = clustered_mean(np.repeat(values, copies), prompts)
    assert repeated.value == pytest.approx(once.value, abs=1e-9)
    assert repeated.error == pytest.approx(once.error, abs=1e-9)
    assert repeated.count == copies * len(values)


def test_the_clustered_error_covers_the_true_mean() -> None:
    generator = np.random.default_rng(0)
    prompts = np.repeat(np.arange(40), 10)
    covered = 0
    for _ in range(400):
        values = generator.normal(size=40)[prompts] + generator.normal(size=400)
        statistic = clustered_mean(values, prompts)
        covered += abs(statistic.value) < 2 * statistic.error
    assert 0.92 < covered / 400 < 0.98


def test_nan_values_are_left_out_and_one_prompt_has_no_error() -> None:
    statistic = clustered_mean([1.0, math.nan, 3.0], [7, 8, 7])
    assert statistic.value == 2.0
    assert math.isnan(statistic.error)
    assert (statistic.count, statistic.prompts) == (2, 1)
    assert not clustered_mean([math.nan], [0]).is_measured
    with pytest.raises(ValueError, match="values and prompts"):
        clustered_mean([1.0, 2.0], [0])


def test_a_figure_exceeds_a_bound_by_two_errors_alone() -> None:
    statistic = mean_over_prompts([0.9, 1.1])
    assert statistic.error == pytest.approx(0.1)
    assert statistic.exceeds(0.7)
    assert not statistic.exceeds(0.85)
    assert statistic.is_below(1.3)
    assert not statistic.is_below(1.1)
    # A single prompt has no error, and so proves nothing.
    assert not mean_over_prompts([5.0]).exceeds(0.0)


@given(
    hnp.arrays(np.float64, (2, 6), elements=st.integers(-5, 5)),
    st.floats(0.1, 10),
    st.floats(-10, 10),
)
def test_a_correlation_ignores_scale_and_offset(
    rows: np.ndarray, scale: float, offset: float
) -> None:
    first, second = rows
    value = correlation(first, second)
    if math.isnan(value):
        assert len(set(first)) == 1 or len(set(second)) == 1
        return
    assert value == pytest.approx(np.corrcoef(first, second)[0, 1], abs=1e-9)
    assert correlation(scale * first + offset, second) == pytest.approx(value, abs=1e-6)
    assert correlation(-first, second) == pytest.approx(-value, abs=1e-9)


def test_two_answers_a_prompt_count_agreements() -> None:
    scores = [[0, 1], [5, 9], [3, 2], [1, 1]]
    lengths = [[10, 20], [1, 2], [4, 8], [3, 9]]
    statistic = within_prompts(scores, lengths)
    # Two agree and one does not; the tie says nothing.
    assert statistic.value == pytest.approx(1 / 3)
    assert statistic.count == 3


def test_members_agree_because_of_gold_or_because_of_their_errors() -> None:
    generator = np.random.default_rng(1)
    members: list[np.ndarray] = []
    gold: list[np.ndarray] = []
    for _ in range(50):
        truth = generator.normal(size=30)
        mistake = generator.normal(size=30)
        independent = truth + generator.normal(size=30)
        twins = truth + mistake
        members.append(np.stack([independent, twins, 2 * twins + 1]))
        gold.append(truth)
    scores = member_correlations(members)
    errors = error_correlations(members, gold)
    assert scores[0, 1] == pytest.approx(0.5, abs=0.05)
    assert errors[0, 1] == pytest.approx(0.0, abs=0.05)
    assert scores[1, 2] == pytest.approx(1.0)
    assert errors[1, 2] == pytest.approx(1.0)
    assert np.allclose(scores, scores.T)


def test_a_member_that_is_gold_has_no_errors() -> None:
    truth = np.array([0.0, 1.0, 2.0, 5.0])
    errors = error_correlations([np.stack([3 * truth + 2, truth**2])], [truth])
    assert math.isnan(errors[0, 1])
