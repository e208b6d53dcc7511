"""Caches of prefixes and adaptive numbers of draws follow their closed forms."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.errors import ConfigError
from infer_align_bench.traffic import Prefixes, batches, lru_hit_share, mean_batches


def lru(popularity: np.ndarray, kept: int, uses: int) -> float:
    """Play the uses of a real cache, and return the share of hits after a warm-up."""
    generator = np.random.default_rng(0)
    cache: OrderedDict[int, None] = OrderedDict()
    hits = []
    for item in generator.choice(len(popularity), size=uses, p=popularity).tolist():
        hits.append(item in cache)
        cache[item] = None
        cache.move_to_end(item)
        if len(cache) > kept:
            cache.popitem(last=False)
    return float(np.mean(hits[uses // 4 :]))


@pytest.mark.parametrize(("skew", "kept"), [(0.0, 30), (0.8, 30), (1.2, 10)])
def test_the_hit_share_is_that_of_a_real_cache(skew: float, kept: int) -> None:
    popularity = Prefixes(1, 200, skew, kept).popularity()
    assert lru_hit_share(popularity, kept) == pytest.approx(lru(popularity, kept, 12_000), abs=0.02)


def test_prefixes_that_are_never_used_need_no_place() -> None:
    assert lru_hit_share(np.array([0.5, 0.5, 0.0, 1e-300]), 2) == 1.0
    assert Prefixes(tokens=50, count=1000, skew=1e300, cache_tokens=100).hit_share(1, "least") == 1


def test_equal_prefixes_hit_as_often_as_they_fit() -> None:
    assert Prefixes(10, 100, 0.0, 250).hit_share(1, "least") == pytest.approx(0.25, abs=1e-6)
    assert Prefixes(10, 100, 0.0, 250).hit_share(2, "affine") == pytest.approx(0.5, abs=1e-6)
    assert Prefixes(10, 100, 0.0, 250).hit_share(4, "affine") == 1
    assert Prefixes(10, 100, 0.0, 9).hit_share(1, "least") == 0
    assert Prefixes().hit_share(9, "affine") == 0


@given(st.integers(1, 50), st.integers(1, 8), st.floats(0, 2))
def test_affinity_and_larger_caches_never_lose(kept: int, replicas: int, skew: float) -> None:
    prefixes = Prefixes(1, 60, skew, kept)
    alone = prefixes.hit_share(replicas, "random")
    assert prefixes.hit_share(replicas, "affine") >= alone - 1e-9
    assert Prefixes(1, 60, skew, kept + 1).hit_share(replicas, "random") >= alone - 1e-9


@given(st.floats(4, 64))
def test_adaptive_requests_draw_the_mean(mean_n: float) -> None:
    drawn = batches(mean_n, 4, 64)
    assert drawn.mean * 4 == pytest.approx(mean_n, rel=1e-6)


def test_the_numbers_of_batches_have_their_mean_and_their_limit() -> None:
    drawn = batches(12.0, 4, 32)
    numbers = drawn.draw(np.random.default_rng(0), 20_000)
    assert numbers.mean() == pytest.approx(3.0, rel=0.02)
    assert (numbers.min(), numbers.max()) == (1, 8)
    assert mean_batches(1.0, 8) == 1
    assert mean_batches(0.0, 8) == 8


@pytest.mark.parametrize("mean_n", [3.0, 40.0])
def test_an_impossible_mean_is_refused(mean_n: float) -> None:
    with pytest.raises(ConfigError, match="must be from 4 to 32"):
        batches(mean_n, 4, 32)
