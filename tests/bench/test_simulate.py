"""The simulation agrees with queues whose latencies are known exactly."""

from __future__ import annotations

import math

import pytest

from infer_align.errors import ConfigError
from infer_align_bench.simulate import JudgePool, replicas_for, simulate
from infer_align_bench.traffic import Batches, Traffic

ARRIVALS = 60_000


def constant(_: int) -> float:
    """One second of service, however many requests are in flight."""
    return 1.0


def batched(in_flight: int) -> float:
    return 1.0 + 0.1 * in_flight


@pytest.mark.slow
@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_slot_with_exponential_work(load: float) -> None:
    """M/M/1: latencies are exponential with mean 1 / (1 - load)."""
    simulated = simulate(constant, load, 1, 1, Traffic(1.0), arrivals=ARRIVALS)
    mean = 1 / (1 - load)
    assert simulated.mean == pytest.approx(mean, rel=0.08)
    assert simulated.p50 == pytest.approx(math.log(2) * mean, rel=0.08)
    assert simulated.p99 == pytest.approx(math.log(100) * mean, rel=0.15)
    assert simulated.waited == pytest.approx(load, rel=0.05)
    assert not simulated.growing


@pytest.mark.slow
@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_slot_with_equal_work(load: float) -> None:
    """M/D/1: the mean wait is load / (2 (1 - load)) (Pollaczek and Khinchine)."""
    simulated = simulate(constant, load, 1, 1, Traffic(0.0), arrivals=ARRIVALS)
    assert simulated.mean == pytest.approx(1 + load / (2 * (1 - load)), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
def test_processor_sharing(spread: float) -> None:
    """M/G/1 with processor sharing: the mean is 1 / (1 - load) for any distribution of work."""
    simulated = simulate(float, 0.6, 1, 200, Traffic(spread), arrivals=ARRIVALS)
    assert simulated.mean == pytest.approx(1 / 0.4, rel=0.08)
    assert simulated.waited == 0


@pytest.mark.slow
def test_several_slots() -> None:
    """M/M/c with c = 4 and 70% load: Erlang's C is the share that waits."""
    offered = 2.8
    slots = 4
    terms = [offered**k / math.factorial(k) for k in range(slots)]
    last = offered**slots / math.factorial(slots) / (1 - offered / slots)
    erlang = last / (sum(terms) + last)
    simulated = simulate(constant, offered, 1, slots, Traffic(1.0), arrivals=ARRIVALS)
    assert simulated.waited == pytest.approx(erlang, rel=0.08)
    assert simulated.mean == pytest.approx(1 + erlang / (slots - offered), rel=0.05)


def test_a_request_goes_to_the_least_loaded_replica() -> None:
    """Two replicas with a shared choice are far better than two separate queues."""
    separate = simulate(constant, 0.8, 1, 1, Traffic(1.0))
    shared = simulate(constant, 1.6, 2, 1, Traffic(1.0))
    assert shared.mean < 0.65 * separate.mean


def test_an_overloaded_queue_grows() -> None:
    assert simulate(constant, 1.3, 1, 1).growing


@pytest.mark.slow
def test_replicas_for_a_percentile() -> None:
    replicas, simulated = replicas_for(batched, 40.0, 8, 3.0)
    assert simulated.p99 <= 3.0
    assert replicas > 40 / (8 / 1.8), "more than the mean load needs"
    fewer = simulate(batched, 40.0, replicas - 1, 8)
    assert fewer.p99 > 3.0 or fewer.growing


@pytest.mark.slow
def test_a_percentile_below_the_latency_of_one_request_is_refused() -> None:
    with pytest.raises(ConfigError, match="is too short: a single request without other load"):
        replicas_for(constant, 5.0, 4, 0.5)


def test_routing_at_random_makes_separate_queues() -> None:
    """Each of four replicas is an M/M/1 queue of its own."""
    simulated = simulate(constant, 2.4, 4, 1, Traffic(1.0, routing="random"), arrivals=20_000)
    assert simulated.mean == pytest.approx(1 / 0.4, rel=0.12)
    assert simulated.waited == pytest.approx(0.6, rel=0.08)


def test_a_bound_on_the_load_is_between_random_and_least() -> None:
    means = []
    for routing in ("least", "affine", "random"):
        traffic = Traffic(1.0, routing=routing)
        means.append(simulate(constant, 6.4, 8, 1, traffic, arrivals=20_000).mean)
    assert means == sorted(means)


def test_a_cached_prefix_saves_its_work() -> None:
    """Only lengths differ: with a hit for each request the service is that of the hit."""
    hits = Traffic(0.0, hit_share=1.0, hit_work=0.5, miss_work=2.0)
    half = simulate(lambda _: 0.5, 0.8, 1, 1, Traffic(0.0))
    assert simulate(constant, 0.8, 1, 1, hits) == half


def test_a_judge_pool_is_a_second_queue() -> None:
    """Behind an M/M/1 queue with shared service stands another: their means add (Burke)."""
    judges = JudgePool(1.0, 1)
    traffic = Traffic(0.0)
    simulated = simulate(lambda _: 1e-6, 0.5, 1, 1, traffic, judges=judges, arrivals=20_000)
    assert simulated.mean == pytest.approx(1 / 0.5, rel=0.1)


def test_more_judges_and_more_replicas_are_never_slower() -> None:
    previous = math.inf
    for replicas in (3, 4, 6, 9):
        mean = simulate(batched, 20.0, replicas, 8, judges=JudgePool(0.05, replicas)).mean
        assert mean < previous
        previous = mean


def test_adaptive_requests_differ_more_than_equal_ones() -> None:
    adaptive = Traffic(0.0, batches=Batches(8, 0.5))
    equal = Traffic(0.0)
    assert simulate(constant, 0.7, 1, 1, adaptive).p99 > simulate(constant, 0.7, 1, 1, equal).p99
