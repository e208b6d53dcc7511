"""Percentiles equal numpy's, and intervals contain the true value about as often as stated."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer_align_bench import intervals
from infer_align_bench.intervals import (
    NAMES,
    PERCENTILES,
    IntervalEstimate,
    _Pool,
    block_length,
    estimates,
    rate,
    ratios,
    share,
)

pytestmark = pytest.mark.slow

Generator = np.random.Generator
numbers = st.floats(-1e6, 1e6, allow_subnormal=False)
value_groups = st.lists(st.lists(numbers, max_size=6), min_size=1, max_size=40).filter(any)


def exact_figures(values: list[float]) -> list[float]:
    percentiles = [float(np.percentile(values, q)) for q in PERCENTILES]
    return [float(np.mean(values)), *percentiles]


def singletons(values: object) -> list[list[float]]:
    """Return one group per value."""
    return np.asarray(values, dtype=float)[:, None].tolist()


def width(estimate: IntervalEstimate) -> float:
    return estimate.high - estimate.low


@given(value_groups)
@settings(max_examples=60, deadline=None)
def test_figures_equal_numpys(groups: list[list[float]]) -> None:
    values = [value for group in groups for value in group]
    result = estimates(groups)
    figures = [result[name].value for name in NAMES]
    np.testing.assert_allclose(figures, exact_figures(values), rtol=1e-9, atol=1e-9)
    low, high = min(values) - 1e-6, max(values) + 1e-6
    for name, estimate in result.items():
        if len(groups) == 1:
            assert np.isnan(estimate.low), "the spread cannot be estimated from one request"
            assert np.isnan(estimate.high)
            continue
        assert low <= estimate.low <= high
        if name == "p99":
            assert np.isnan(estimate.high)
        else:
            assert np.isnan(estimate.high) or estimate.high <= high


def test_a_resample_equals_repeated_values() -> None:
    generator = np.random.default_rng(0)
    groups = [generator.exponential(size=generator.integers(0, 5)) for _ in range(30)]
    counts = generator.multinomial(30, np.full(30, 1 / 30))
    repeated = np.concatenate(
        [np.tile(group, count) for group, count in zip(groups, counts, strict=True)]
    )
    np.testing.assert_allclose(_Pool(groups).figures(counts), exact_figures(repeated.tolist()))


def test_no_values_give_no_estimates() -> None:
    assert estimates([]) == {}
    assert estimates([[], []]) == {}
    assert ratios([[], []], [[1.0], [2.0]]) == {}


def test_ratios_need_pairs() -> None:
    with pytest.raises(ValueError, match="not pairs"):
        ratios([[1.0]], [[1.0], [2.0]])


def test_the_same_seed_gives_the_same_interval() -> None:
    values = singletons(range(20))
    assert estimates(values, 3) == estimates(values, 3)
    assert estimates(values, 3) != estimates(values, 4)


def independent(generator: Generator) -> list[float]:
    return generator.lognormal(0.0, 0.5, 150).tolist()


def autoregressive(generator: Generator, count: int = 400, rho: float = 0.6) -> list[float]:
    """Return a normal series with autocorrelation and a standard deviation of 1.25."""
    noise = generator.normal(size=count)
    values = [generator.normal() / np.sqrt(1 - rho**2)]
    for i in range(1, count):
        values.append(rho * values[-1] + noise[i])
    return values


def queue(
    generator: Generator, count: int = 1000, load: float = 0.7, warmup: int = 1000
) -> list[float]:
    """Return latencies of an M/M/1 queue with a mean service of 1 (Lindley's recursion).

    They are exponential with mean 1 / (1 - load).
    """
    gaps = generator.exponential(1 / load, count + warmup)
    services = generator.exponential(1, count + warmup)
    wait = 0.0
    latencies = []
    for gap, service in zip(gaps, services, strict=True):
        wait = max(0.0, wait - gap)
        latencies.append(wait + service)
        wait += service
    return latencies[warmup:]


def coverage(
    series: Callable[[Generator], list[float]], truth: dict[str, float], runs: int
) -> dict[str, float]:
    """Return the share of runs in which each interval contains the true value.

    An unknown end contains everything.
    """
    generator = np.random.default_rng(7)
    hits = dict.fromkeys(truth, 0)
    for seed in range(runs):
        result = estimates(singletons(series(generator)), seed)
        for name, value in truth.items():
            outside = value > result[name].high
            hits[name] += result[name].low <= value and not outside
    return {name: count / runs for name, count in hits.items()}


LOGNORMAL = {"mean": np.exp(0.125), "p50": 1.0, "p90": np.exp(0.6408)}
NORMAL = {"mean": 0.0, "p50": 0.0, "p90": 1.2816 / 0.8, "p99": 2.3263 / 0.8}
EXPONENTIAL = {
    "mean": 1 / 0.3,
    "p50": np.log(2) / 0.3,
    "p90": np.log(10) / 0.3,
    "p99": np.log(100) / 0.3,
}


@pytest.mark.parametrize(
    ("series", "truth", "at_least"),
    [
        (independent, LOGNORMAL, 0.84),
        (autoregressive, NORMAL, 0.8),
        (queue, EXPONENTIAL, 0.72),
    ],
)
def test_intervals_contain_the_true_value(
    monkeypatch: pytest.MonkeyPatch,
    series: Callable[[Generator], list[float]],
    truth: dict[str, float],
    at_least: float,
) -> None:
    """The coverage is near 95% with autocorrelation too, where single draws have far less."""
    monkeypatch.setattr(intervals, "REPLICATES", 200)
    by_blocks = coverage(series, truth, 60)
    assert min(by_blocks.values()) >= at_least, by_blocks
    if series is not independent:
        monkeypatch.setattr(intervals, "block_length", lambda _: 1)
        by_single_draws = coverage(series, {"mean": truth["mean"]}, 60)
        assert by_single_draws["mean"] < by_blocks["mean"] - 0.15


def test_blocks_are_as_long_as_the_autocorrelation() -> None:
    generator = np.random.default_rng(0)
    without = [block_length(generator.normal(size=400)) for _ in range(20)]
    assert np.mean(without) < 2
    with_memory = [block_length(autoregressive(generator)) for _ in range(20)]
    assert 5 < np.mean(with_memory) < 20
    assert block_length([1.0, 2.0] * 200) == 1, "opposite neighbours"
    assert block_length([]) == block_length([1.0]) == block_length([1.0] * 50) == 1


def test_the_upper_end_is_unknown_with_few_values() -> None:
    values = singletons(np.random.default_rng(1).exponential(size=2000))
    assert np.isnan(estimates(values[:300])["p99"].high)
    assert np.isfinite(estimates(values[:300])["p90"].high)
    assert np.isfinite(estimates(values)["p99"].high)
    dependent = singletons(queue(np.random.default_rng(1)))
    assert np.isnan(estimates(dependent)["p99"].high), "1,000 dependent values are worth few"


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (1, 1, 0.2065, 1.0)],
)
def test_a_share_has_wilsons_interval(successes: int, total: int, low: float, high: float) -> None:
    estimate = share(successes, total)
    actual = (estimate.value, estimate.low, estimate.high)
    assert actual == pytest.approx((successes / total, low, high), abs=1e-4)


def test_a_share_of_nothing_is_unknown() -> None:
    assert np.isnan(share(0, 0).value)


def test_gaps_of_one_request_do_not_count_as_independent() -> None:
    """Ten requests of constant speed have an interval as wide as ten values have."""
    generator = np.random.default_rng(5)
    speeds = generator.normal(10, 2, 10)
    grouped = estimates([np.full(100, speed) for speed in speeds])["mean"]
    single = estimates(singletons(speeds))["mean"]
    assert (grouped.low, grouped.high) == pytest.approx((single.low, single.high))
    scattered = estimates(singletons(generator.permutation(np.repeat(speeds, 100))))["mean"]
    assert width(grouped) > 5 * width(scattered)


def test_pairs_remove_the_common_variation() -> None:
    """Requests differ tenfold and the targets by 10%, which only pairs reveal."""
    generator = np.random.default_rng(2)
    work = generator.uniform(1, 10, 60)
    first = singletons(work * 0.9 * generator.normal(1, 0.01, 60))
    second = singletons(work)
    paired = ratios(first, second)["mean"]
    assert 0.89 < paired.low < paired.value < paired.high < 0.91
    assert paired.value == pytest.approx(np.mean(first) / np.mean(second))
    shuffled = [first[i] for i in generator.permutation(60)]
    assert width(ratios(shuffled, second)["mean"]) > 5 * width(paired)


@given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(0.1, 1e3)), min_size=2, max_size=30))
@settings(max_examples=40, deadline=None)
def test_a_rate_is_a_ratio_of_sums(pairs: list[tuple[float, float]]) -> None:
    amounts, seconds = zip(*pairs, strict=True)
    estimate = rate(amounts, seconds).estimate
    assert estimate.value == pytest.approx(sum(amounts) / sum(seconds))
    single = [amount / time for amount, time in pairs]
    assert min(single) - 1e-9 <= estimate.low <= estimate.high <= max(single) + 1e-9


def test_the_ratio_of_two_rates() -> None:
    generator = np.random.default_rng(4)
    fast = rate(np.ones(300), generator.exponential(0.1, 300), 0)
    slow = rate(np.ones(300), generator.exponential(0.2, 300), 1)
    ratio = fast.over(slow)
    assert ratio.value == pytest.approx(fast.estimate.value / slow.estimate.value)
    assert ratio.low < 2 < ratio.high
    assert width(ratio) < 1
