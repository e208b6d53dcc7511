"""The gold of the best of n, and the n up to which it rises."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.diagnostics.overoptimisation import (
    GoldCurve,
    gold_curve,
    mean_curve,
    sizes,
    trust,
)
from infer_align.methods.best_of_n import expected_best, kl_upper_bound

# Makes the scores of a pool from its gold.
ProxyOf = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@given(st.lists(st.integers(0, 600), max_size=10))
def test_sizes_ascend_from_one_to_what_most_pools_reach(answers: list[int]) -> None:
    grid = sizes(answers)
    if not answers:
        assert grid == ()
        return
    assert list(grid) == sorted(set(grid))
    if grid:
        assert grid[0] == 1
        assert sum(count >= grid[-1] for count in answers) >= 0.75 * len(answers)
    larger = grid[-1] + 1 if grid else 1
    assert sum(count >= larger for count in answers) < max(1, 0.75 * len(answers))


def test_sizes_double_with_one_step_between() -> None:
    assert sizes([57]) == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 57)


def test_each_point_is_the_unbiased_estimate() -> None:
    proxy = [[3.0, 1.0, 2.0], [0.0, 1.0, math.nan, 5.0]]
    gold = [[0.1, 0.5, 0.9], [1.0, 0.0, 0.7, 0.2]]
    curve = gold_curve(proxy, gold, (1, 2, 3))
    assert curve.gold[0].tolist() == [expected_best(proxy[0], gold[0], n) for n in (1, 2, 3)]
    assert curve.gold[1, 2] == expected_best([0.0, 1.0, 5.0], [1.0, 0.0, 0.2], 3)
    assert curve.kl == tuple(kl_upper_bound(n) for n in (1, 2, 3))
    assert curve.means[0].value == pytest.approx(np.mean([0.5, 0.4]))


def test_small_pools_are_left_out_at_every_size() -> None:
    curve = gold_curve([[1.0, 2.0], [1.0]], [[0.0, 1.0], [9.0]], (1, 2))
    assert curve.gold.shape == (1, 2)
    empty = gold_curve([], [], (1, 2))
    assert empty.gold.shape == (0, 2)
    with pytest.raises(ValueError, match="no prompts"):
        trust(empty)


def curve_of(proxy_of: ProxyOf, prompts: int = 80) -> GoldCurve:
    generator = np.random.default_rng(6)
    proxies: list[np.ndarray] = []
    golds: list[np.ndarray] = []
    for _ in range(prompts):
        gold = generator.normal(size=64)
        proxies.append(proxy_of(gold, generator))
        golds.append(gold)
    return gold_curve(proxies, golds, sizes([64] * prompts))


def test_a_faithful_reward_is_trusted_to_the_end_of_the_data() -> None:
    result = trust(curve_of(lambda gold, _: 2 * gold + 1))
    assert (result.n, result.peak, result.largest) == (64, 64, 64)
    assert result.is_limited_by_data
    assert result.gain.exceeds(2.0)
    assert result.fall.value == 0


def test_a_hacked_reward_is_trusted_up_to_its_peak_alone() -> None:
    def hacked(gold: np.ndarray, _: np.random.Generator) -> np.ndarray:
        """Like gold, but the worst answer of all has the highest score."""
        return np.where(gold == gold.min(), 99.0, gold)

    result = trust(curve_of(hacked))
    assert 2 < result.n < 32
    assert result.n == result.peak
    assert result.fall.is_below(-1.0)
    assert not result.is_limited_by_data


def test_noise_is_trusted_at_no_n_above_one() -> None:
    result = trust(curve_of(lambda gold, generator: generator.normal(size=len(gold))))
    assert result.n == 1
    opposed = trust(curve_of(lambda gold, _: -gold))
    assert (opposed.n, opposed.peak) == (1, 1)
    assert opposed.fall.is_below(-2.0)


def test_the_mean_of_curves_is_taken_prompt_by_prompt() -> None:
    first = GoldCurve((1, 2), np.array([[0.0, 1.0], [2.0, 2.0]]))
    second = GoldCurve((1, 2), np.array([[2.0, 3.0], [0.0, 0.0]]))
    mean = mean_curve([first, second])
    assert mean.gold.tolist() == [[1.0, 2.0], [1.0, 1.0]]
    assert mean.change(0, 1).value == 0.5
