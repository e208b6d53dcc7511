"""The simulation agrees with queues whose latencies are known exactly."""

from __future__ import annotations

import math

import pytest

from infer_align.errors import ConfigError
from infer_align_bench.simulate import replicas_for, simulate

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
    simulated = simulate(constant, load, 1, 1, 1.0, arrivals=ARRIVALS)
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
    simulated = simulate(constant, load, 1, 1, 0.0, arrivals=ARRIVALS)
    assert simulated.mean == pytest.approx(1 + load / (2 * (1 - load)), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
def test_processor_sharing(spread: float) -> None:
    """M/G/1 with processor sharing: the mean is 1 / (1 - load) for any distribution of work."""
    simulated = simulate(float, 0.6, 1, 200, spread, arrivals=ARRIVALS)
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
    simulated = simulate(constant, offered, 1, slots, 1.0, arrivals=ARRIVALS)
    assert simulated.waited == pytest.approx(erlang, rel=0.08)
    assert simulated.mean == pytest.approx(1 + erlang / (slots - offered), rel=0.05)


def test_a_request_goes_to_the_least_loaded_replica() -> None:
    """Two replicas with a shared choice are far better than two separate queues."""
    separate = simulate(constant, 0.8, 1, 1, 1.0)
    shared = simulate(constant, 1.6, 2, 1, 1.0)
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
