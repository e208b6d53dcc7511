"""The distance of two rewards is a metric on what they choose."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from infer_align.diagnostics.distance import canonical, mean_distance, reward_distance

ROWS = hnp.arrays(np.float64, (3, 5), elements=st.integers(-4, 4))


@given(ROWS, st.floats(0.1, 100), st.floats(-100, 100))
def test_offset_and_positive_scale_do_not_count(
    rows: np.ndarray, scale: float, offset: float
) -> None:
    first, second, _ = rows
    distance = reward_distance(first, second)
    assert reward_distance(scale * first + offset, second) == pytest.approx(distance, abs=1e-6)
    assert 0 <= distance <= 1


@given(ROWS)
def test_it_is_symmetric_and_obeys_the_triangle(rows: np.ndarray) -> None:
    first, second, third = rows
    assert reward_distance(first, second) == pytest.approx(reward_distance(second, first))
    assert reward_distance(first, first) == 0
    detour = reward_distance(first, second) + reward_distance(second, third)
    assert reward_distance(first, third) <= detour + 1e-9


@given(ROWS)
def test_it_follows_from_the_correlation(rows: np.ndarray) -> None:
    first, second, _ = rows
    if len(set(first)) > 1 and len(set(second)) > 1:
        r = np.corrcoef(first, second)[0, 1]
        expected = math.sqrt(max(0.0, (1 - r) / 2))
        assert reward_distance(first, second) == pytest.approx(expected, abs=1e-6)


def test_extremes() -> None:
    scores = [1.0, 2.0, 4.0]
    assert reward_distance(scores, [-1.0, -2.0, -4.0]) == pytest.approx(1)
    assert reward_distance(scores, [7.0, 7.0, 7.0]) == pytest.approx(0.5)
    assert np.linalg.norm(canonical(scores)) == pytest.approx(1)
    assert not canonical([3.0, 3.0]).any()


def test_missing_scores_are_left_out() -> None:
    assert reward_distance([1.0, 2.0, math.nan], [1.0, 2.0, -9.0]) == 0
    assert math.isnan(reward_distance([1.0, math.nan], [1.0, 2.0]))
    statistic = mean_distance([[1, 2], [1, 2], [1]], [[1, 2], [2, 1], [1]])
    assert (statistic.value, statistic.count) == (pytest.approx(0.5), 2)
