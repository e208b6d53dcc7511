"""Percentiles are numpy's, and the intervals hold the truth about as often as they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer_align_bench import quantiles
from infer_align_bench.quantiles import (
    NAMES,
    PERCENTILES,
    _Pool,
    block_length,
    estimates,
    rate,
    ratios,
    share,
)

numbers = st.floats(-1e6, 1e6, allow_subnormal=False)
groups = st.lists(st.lists(numbers, max_size=6), min_size=1, max_size=40).filter(any)


def expected(values: list[float]) -> list[float]:
    return [float(np.mean(values)), *(float(np.percentile(values, q)) for q in PERCENTILES)]


@given(groups)
@settings(max_examples=60, deadline=None)
def test_figures_are_numpys(found: list[list[float]]) -> None:
    flat = [value for group in found for value in group]
    made = estimates(found)
    np.testing.assert_allclose(
        [made[name].value for name in NAMES], expected(flat), rtol=1e-9, atol=1e-9
    )
    for name, one in made.items():
        if len(found) > 1:
            assert min(flat) - 1e-6 <= one.low <= max(flat) + 1e-6
            assert (
                np.isnan(one.high)
                if name == "p99"
                else one.high <= max(flat) + 1e-6 or np.isnan(one.high)
            )
        else:
            assert np.isnan(one.low), "one request says nothing of the next"
            assert np.isnan(one.high)


def test_a_resample_is_what_repeating_values_gives() -> None:
    chance = np.random.default_rng(0)
    found = [chance.exponential(size=chance.integers(0, 5)) for _ in range(30)]
    counts = chance.multinomial(30, np.full(30, 1 / 30))
    repeated = np.concatenate(
        [np.tile(group, count) for group, count in zip(found, counts, strict=True)]
    )
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


def autoregressive(chance: np.random.Generator, count: int = 400, rho: float = 0.6) -> list[float]:
    """A series in which each value remembers the one before; normal, standard deviation 1.25."""
    noise, found = chance.normal(size=count), [chance.normal() / np.sqrt(1 - rho**2)]
    for i in range(1, count):
        found.append(rho * found[-1] + noise[i])
    return found


def queue(
    chance: np.random.Generator, count: int = 1000, load: float = 0.7, before: int = 1000
) -> list[float]:
    """Times in an M/M/1 queue with a mean service of 1 (Lindley's recursion): exponential with mean 1 / (1 - load)."""
    wait, found = 0.0, []
    for gap, service in zip(
        chance.exponential(1 / load, count + before),
        chance.exponential(1, count + before),
        strict=True,
    ):
        wait = max(0.0, wait - gap)
        found.append(wait + service)
        wait += service
    return found[before:]


def covered(
    series: Callable[[np.random.Generator], Any], truth: dict[str, float], runs: int
) -> dict[str, float]:
    """In which share of runs each interval holds the truth; an end that is not known holds everything."""
    chance, held = np.random.default_rng(7), dict.fromkeys(truth, 0)
    for i in range(runs):
        found = estimates([[x] for x in series(chance)], i)
        for name, true in truth.items():
            held[name] += found[name].low <= true and not true > found[name].high
    return {name: count / runs for name, count in held.items()}


@pytest.mark.parametrize(
    ("series", "truth", "at_least"),
    [
        (
            lambda chance: chance.lognormal(0.0, 0.5, 150),
            {"mean": np.exp(0.125), "p50": 1.0, "p90": np.exp(0.6408)},
            0.84,
        ),
        (autoregressive, {"mean": 0.0, "p50": 0.0, "p90": 1.2816 / 0.8, "p99": 2.3263 / 0.8}, 0.8),
        (
            queue,
            {
                "mean": 1 / 0.3,
                "p50": np.log(2) / 0.3,
                "p90": np.log(10) / 0.3,
                "p99": np.log(100) / 0.3,
            },
            0.72,
        ),
    ],
    ids=["independent", "autoregressive", "queue"],
)
def test_coverage(
    monkeypatch: pytest.MonkeyPatch, series: Any, truth: dict[str, float], at_least: float
) -> None:
    """Near the 95% that they say, also where requests hang together; drawn one by one they would hold far less."""
    monkeypatch.setattr(quantiles, "REPLICATES", 200)
    held = covered(series, truth, 60)
    assert all(share >= at_least for share in held.values()), held
    if "p99" in truth:
        monkeypatch.setattr(quantiles, "block_length", lambda _: 1)
        assert covered(series, {"mean": truth["mean"]}, 60)["mean"] < held["mean"] - 0.15


def test_blocks_are_as_long_as_memory() -> None:
    chance = np.random.default_rng(0)
    assert np.mean([block_length(chance.normal(size=400)) for _ in range(20)]) < 2
    assert 5 < np.mean([block_length(autoregressive(chance)) for _ in range(20)]) < 20
    assert block_length([1.0, 2.0] * 200) == 1, "neighbours that make up for each other"
    assert block_length([]) == block_length([1.0]) == block_length([1.0] * 50) == 1


def test_an_upper_end_that_nobody_has_seen_is_not_known() -> None:
    values = np.random.default_rng(1).exponential(size=2000)
    assert np.isnan(estimates([[x] for x in values[:300]])["p99"].high)
    assert np.isfinite(estimates([[x] for x in values[:300]])["p90"].high)
    assert np.isfinite(estimates([[x] for x in values])["p99"].high)
    assert np.isnan(estimates([[x] for x in queue(np.random.default_rng(1))])["p99"].high), (
        "1,000 that hang together are few"
    )


@pytest.mark.parametrize(
    ("good", "of", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (1, 1, 0.2065, 1.0)],
)
def test_wilsons_interval(good: int, of: int, low: float, high: float) -> None:
    found = share(good, of)
    assert (found.value, found.low, found.high) == pytest.approx((good / of, low, high), abs=1e-4)
    assert np.isnan(share(0, 0).value)


def test_gaps_of_one_request_are_not_taken_as_independent() -> None:
    """Ten requests, each with a speed of its own: as wide as ten values allow, not as a thousand."""
    chance = np.random.default_rng(5)
    speeds = chance.normal(10, 2, 10)
    grouped = estimates([np.full(100, speed) for speed in speeds])["mean"]
    alone = estimates([[speed] for speed in speeds])["mean"]
    apart = estimates(chance.permutation(np.repeat(speeds, 100))[:, None].tolist())["mean"]
    assert grouped == pytest.approx(alone) or (grouped.low, grouped.high) == pytest.approx(
        (alone.low, alone.high)
    )
    assert grouped.high - grouped.low > 5 * (apart.high - apart.low), (
        "were they scattered over the run"
    )


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
    one = found.estimate
    assert one.value == pytest.approx(sum(amounts) / sum(seconds))
    each = [a / s for a, s in pairs]
    assert min(each) - 1e-9 <= one.low <= one.high <= max(each) + 1e-9


def test_the_ratio_of_two_rates() -> None:
    chance = np.random.default_rng(4)
    fast, slow = (
        rate(np.ones(300), chance.exponential(mean, 300), i) for i, mean in enumerate((0.1, 0.2))
    )
    found = fast.over(slow)
    assert found.value == pytest.approx(fast.estimate.value / slow.estimate.value)
    assert found.low < 2 < found.high
    assert found.high - found.low < 1
