"""Every candidate has a seed of its own, derived from the seed of the request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.flow.seeds import SEED_RANGE, candidate_seed, seed_draws
from infer_align.types import Draw
from tests.flow.builders import plan_request


@given(st.integers(-(2**63), 2**63 - 1), st.integers(1, 16))
def test_seeds_are_in_range_distinct_and_the_first_is_the_plain_requests(seed: int, n: int) -> None:
    seeds = plan_request({"best_of_n": {"n": n}}, seed=seed).draws[0].seeds
    assert len(set(seeds)) == n
    assert all(0 <= s < SEED_RANGE for s in seeds)
    assert seeds[0] == plan_request(seed=seed).draws[0].seeds[0]


@pytest.mark.parametrize(
    ("index", "seed"),
    [(0, 0), (1, 0x6220A8397B1DCDAF), (2, 0x6E789E6AA1B965F4), (3, 0x06C45D188009454F)],
)
def test_the_seeds_of_seed_0_are_those_of_splitmix64(index: int, seed: int) -> None:
    assert candidate_seed(0, index) == seed


def test_the_first_candidate_has_the_seed_of_the_request() -> None:
    assert candidate_seed(42, 0) == 42
    assert candidate_seed(SEED_RANGE - 1, 0) == SEED_RANGE - 1


def test_neighbouring_seeds_share_no_candidates() -> None:
    first = {candidate_seed(7, i) for i in range(16)}
    second = {candidate_seed(8, i) for i in range(16)}
    assert first.isdisjoint(second)


@pytest.mark.parametrize("requested", [True, False])
def test_candidates_are_seeded_over_all_draws(requested: bool) -> None:
    draws = (Draw({}, 2), Draw({}, 1))
    first, second = seed_draws(draws, 7, requested=requested)
    assert first.seeds == (7, candidate_seed(7, 1))
    assert second.seeds == (candidate_seed(7, 2),)
    assert first.seed_requested is second.seed_requested is requested
