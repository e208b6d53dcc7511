"""The simulation against queues whose answer is known."""

from __future__ import annotations

import math

import pytest

from infer_align.errors import ConfigError
from infer_align_bench.simulate import replicas_for, simulate


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_at_a_time_exponential(load: float) -> None:
    """M/M/1: times are exponential with mean 1 / (1 - load), in units of the service."""
    found = simulate(lambda _: 1.0, load, 1, 1, 1.0, arrivals=60_000)
    mean = 1 / (1 - load)
    assert found.mean == pytest.approx(mean, rel=0.08)
    assert found.p50 == pytest.approx(math.log(2) * mean, rel=0.08)
    assert found.p99 == pytest.approx(math.log(100) * mean, rel=0.15)
    assert found.waited == pytest.approx(load, rel=0.05)
    assert not found.growing


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_at_a_time_all_alike(load: float) -> None:
    """M/D/1: the mean wait is load / (2 (1 - load)) services (Pollaczek and Khinchine)."""
    found = simulate(lambda _: 1.0, load, 1, 1, 0.0, arrivals=60_000)
    assert found.mean == pytest.approx(1 + load / (2 * (1 - load)), rel=0.05)


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
def test_all_share_one_machine(spread: float) -> None:
    """M/G/1 by processor sharing: the mean is 1 / (1 - load) whatever the lengths are."""
    found = simulate(float, 0.6, 1, 200, spread, arrivals=60_000)
    assert found.mean == pytest.approx(1 / 0.4, rel=0.08)
    assert found.waited == 0


def test_many_places_without_waiting() -> None:
    """M/M/c with c = 4 slots of the same speed, 70% used: Erlang's C says how many wait."""
    offered, places = 2.8, 4
    terms = [offered**k / math.factorial(k) for k in range(places)]
    last = offered**places / math.factorial(places) / (1 - offered / places)
    erlang = last / (sum(terms) + last)
    found = simulate(lambda _: 1.0, offered, 1, places, 1.0, arrivals=60_000)
    assert found.waited == pytest.approx(erlang, rel=0.08)
    assert found.mean == pytest.approx(1 + erlang / (places - offered), rel=0.05)


def test_the_least_loaded_replica_is_chosen() -> None:
    """Two replicas by turns of a coin would each be a queue of its own; the shorter one of two is far better."""
    apart = simulate(lambda _: 1.0, 0.8, 1, 1, 1.0)
    together = simulate(lambda _: 1.0, 1.6, 2, 1, 1.0)
    assert together.mean < 0.65 * apart.mean


def test_a_queue_that_only_grows_says_so() -> None:
    assert simulate(lambda _: 1.0, 1.3, 1, 1).growing


def test_replicas_for_a_target() -> None:
    replicas, found = replicas_for(lambda m: 1.0 + 0.1 * m, 40.0, 8, 3.0)
    assert found.p99 <= 3.0
    assert replicas > 40 / (8 / 1.8), "more than the mean load needs"
    fewer = simulate(lambda m: 1.0 + 0.1 * m, 40.0, replicas - 1, 8)
    assert fewer.p99 > 3.0 or fewer.growing
    with pytest.raises(ConfigError, match="cannot be kept: alone a request takes"):
        replicas_for(lambda _: 1.0, 5.0, 4, 0.5)
