"""Percentiles are numpy's, and the intervals hold the truth about as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer_align_bench.quantiles import NAMES, PERCENTILES, _Pool, estimates, rate, ratios

numbers = st.floats(-1e6, 1e6, allow_subnormal=False)
groups = st.lists(st.lists(numbers, max_size=6), min_size=1, max_size=40).filter(any)


def expected(values: list[float]) -> list[float]:
    return [float(np.mean(values)), *(float(np.percentile(values, q)) for q in PERCENTILES)]


@given(groups)
@settings(max_examples=60, deadline=None)
def test_figures_are_numpys(found: list[list[float]]) -> None:
    flat = [value for group in found for value in group]
    made = estimates(found)
    np.testing.assert_allclose([made[name].value for name in NAMES], expected(flat), rtol=1e-9, atol=1e-9)
    for one in made.values():
        if len(found) > 1:
            assert min(flat) - 1e-6 <= one.low <= one.high <= max(flat) + 1e-6
        else:
            assert np.isnan(one.low), "one request says nothing of the next"
            assert np.isnan(one.high)


def test_a_resample_is_what_repeating_values_gives() -> None:
    chance = np.random.default_rng(0)
    found = [chance.exponential(size=chance.integers(0, 5)) for _ in range(30)]
    counts = chance.multinomial(30, np.full(30, 1 / 30))
    repeated = np.concatenate([np.tile(group, count) for group, count in zip(found, counts, strict=True)])
    np.testing.assert_allclose(_Pool(found).figures(counts), expected(repeated.tolist()))


def test_nothing_gives_nothing() -> None:
    assert estimates([]) == {}
    assert estimates([[], []]) == {}
    assert ratios([[], []], [[1.0], [2.0]]) == {}
    with pytest.raises(ValueError, match="no pairs"):
        ratios([[1.0]], [[1.0], [2.0]])


def test_the_same_seed_gives_the_same_interval() -> None:
    values = [[float(i)] for i in range(20)]
    assert estimates(values, 3) == estimates(values, 3)
    assert estimates(values, 3) != estimates(values, 4)


def test_coverage() -> None:
    """Of lognormal latencies, 150 requests: the interval holds the true figure in about 95 of 100 runs."""
    chance, runs = np.random.default_rng(11), 120
    truth = {"mean": np.exp(0.5 * 0.25), "p50": 1.0, "p90": np.exp(0.5 * 1.2815515655446004)}
    held = dict.fromkeys(truth, 0)
    for i in range(runs):
        found = estimates([[x] for x in chance.lognormal(0.0, 0.5, 150)], i)
        for name, true in truth.items():
            held[name] += found[name].low <= true <= found[name].high
    assert all(0.86 <= count / runs <= 0.995 for count in held.values()), held


def test_gaps_of_one_request_are_not_taken_as_independent() -> None:
    """Ten requests, each with a speed of its own: as wide as ten values allow, not as a thousand."""
    chance = np.random.default_rng(5)
    speeds = chance.normal(10, 2, 10)
    grouped = estimates([np.full(100, speed) for speed in speeds])["mean"]
    alone = estimates([[speed] for speed in speeds])["mean"]
    apart = estimates([[speed] for speed in speeds for _ in range(100)])["mean"]
    assert grouped == pytest.approx(alone) or (grouped.low, grouped.high) == pytest.approx((alone.low, alone.high))
    assert grouped.high - grouped.low > 5 * (apart.high - apart.low)


def test_pairs_take_out_what_they_share() -> None:
    """Requests differ tenfold, the two targets by 10%: only as pairs does it show."""
    chance = np.random.default_rng(2)
    work = chance.uniform(1, 10, 60)
    ours = [[x * 0.9 * noise] for x, noise in zip(work, chance.normal(1, 0.01, 60), strict=True)]
    theirs = [[x] for x in work]
    found = ratios(ours, theirs)["mean"]
    assert 0.89 < found.low < found.value < found.high < 0.91
    assert found.value == pytest.approx(np.mean(ours) / np.mean(theirs))
    shuffled = ratios([ours[i] for i in chance.permutation(60)], theirs)["mean"]
    assert shuffled.high - shuffled.low > 5 * (found.high - found.low)


@given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(0.1, 1e3)), min_size=2, max_size=30))
@settings(max_examples=40, deadline=None)
def test_a_rate_is_a_ratio_of_sums(pairs: list[tuple[float, float]]) -> None:
    amounts, seconds = zip(*pairs, strict=True)
    found = rate(amounts, seconds)
    assert found.value == pytest.approx(sum(amounts) / sum(seconds))
    each = [a / s for a, s in pairs]
    assert min(each) - 1e-9 <= found.low <= found.high <= max(each) + 1e-9
