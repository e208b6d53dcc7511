"""Tests of the sibling caches of value LMs, against forward passes without a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from infer_align.decoding.cache import RowCache
from infer_align.decoding.siblings import ValueCache, keep_sampled_siblings
from tests.decoding.value_lms import HEADS, TinyValueLM


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """Run each test in inference mode, as the scheduler's thread does."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", params=[False, True], ids=["masked", "pass"])
def lm(request: pytest.FixtureRequest, device: torch.device) -> Any:
    return TinyValueLM(device, has_pass=request.param)


def prefilled(lm: Any, ids: list[int], member: int) -> ValueCache:
    cache = RowCache()
    tokens = torch.tensor([ids], device=lm.lm.device)
    lm.forward(tokens, cache, torch.arange(len(ids), device=lm.lm.device)[None], None)
    return ValueCache(lm, [member], [len(ids)], cache)


def batch_of(lm: Any, texts: Sequence[list[int]]) -> ValueCache:
    cache = prefilled(lm, texts[0], 0)
    for member, text in enumerate(texts[1:], start=1):
        cache = cache.join(prefilled(lm, text, member))
    return cache


def expect_siblings(lm: Any, cache: ValueCache, texts: list[list[int]], ids: torch.Tensor) -> None:
    values = cache.siblings(ids)
    assert values.shape == (*ids.shape, HEADS)
    for row, text in enumerate(texts):
        for place, token in enumerate(ids[row].tolist()):
            torch.testing.assert_close(values[row, place], lm.value([*text, token]))


def test_siblings_are_valued_and_the_chosen_one_stays(lm: Any, device: torch.device) -> None:
    texts = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]
    cache = batch_of(lm, texts)
    for step in range(3):
        ids = torch.tensor([[11, 12, 13], [14, 15, 16], [17, 18, 19]], device=device) + step
        expect_siblings(lm, cache, texts, ids)
        # The second row samples a token outside its candidates.
        chosen = torch.tensor([int(ids[0, 1]), 29 - step, int(ids[2, 0])], device=device)
        cache.choose(chosen)
        for text, token in zip(texts, chosen.tolist(), strict=True):
            text.append(token)
        assert cache.lengths == [len(text) for text in texts]


def test_rows_leave_and_join_with_their_positions(lm: Any, device: torch.device) -> None:
    texts = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]
    cache = batch_of(lm, texts).take([2, 1])
    assert cache.members == [1, 0]
    assert cache.cache.length == 3, "the longest row has left"
    joined = cache.join(prefilled(lm, [20, 21, 22, 23], 0).shifted(2))
    assert joined.members == [1, 0, 2]
    ids = torch.tensor([[11, 12], [13, 14], [15, 16]], device=device)
    expect_siblings(lm, joined, [[6, 7], [8, 9, 10], [20, 21, 22, 23]], ids)


def test_a_cache_without_rows_joins_as_nothing(lm: Any) -> None:
    cache = batch_of(lm, [[1, 2], [3]])
    empty = cache.take([])
    assert empty.members == []
    assert empty.join(cache) is cache
    assert cache.join(empty) is cache


def test_sampled_tokens_reach_the_rows_of_each_cache(lm: Any, device: torch.device) -> None:
    texts = [[1, 2, 3], [4, 5]]
    cache = ValueCache(lm, [0, 2], [3, 2], batch_of(lm, texts).cache)
    candidates = torch.tensor([[11, 12], [13, 14], [15, 16]], device=device)
    cache.siblings(candidates[cache.members])
    keep_sampled_siblings([cache], [12, 13, 15])
    ids = torch.tensor([[21, 22], [23, 24]], device=device)
    expect_siblings(lm, cache, [[1, 2, 3, 12], [4, 5, 15]], ids)
