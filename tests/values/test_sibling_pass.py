"""The pass of a value LM over siblings: padding, buffers and what a CUDA graph forbids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from infer_align.decoding.cache import RowCache
from infer_align.decoding.siblings import ValueCache, read_tokens
from infer_align.values import _sibling_pass
from infer_align.values._sibling_pass import MAX_SIBLINGS, CacheShape, ReadSiblings
from infer_align.values._sibling_reading import OwnColumns, SiblingReading, reading_siblings
from infer_align.values._step_graphs import WaitingCalls
from tests.decoding.value_lms import HEADS, VOCABULARY, TinyValueLM

TEXTS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """Run each test in inference mode, as the engines do."""
    with torch.inference_mode():
        yield


@pytest.fixture
def lm(device: torch.device) -> Any:
    return TinyValueLM(device, has_pass=True)


def cache_of(lm: Any, texts: list[list[int]]) -> ValueCache:
    cache = ValueCache(lm, [], [], RowCache())
    for row, text in enumerate(texts):
        cache = cache.join(ValueCache(lm, [row], [len(text)], read_tokens(lm, text)))
    return cache


def read(lm: Any, cache: ValueCache, ids: torch.Tensor) -> ReadSiblings:
    result: ReadSiblings = lm.sibling_pass.read(ids, cache.cache, cache.lengths)
    return result


def some_ids(rows: int, k: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 100 + k)
    return torch.randint(0, VOCABULARY, (rows, k), generator=generator).to(device)


@pytest.mark.parametrize(
    ("rows", "k", "padded"),
    [
        (1, 20, 1),
        (2, 20, 2),
        (3, 20, 4),
        (5, 20, 8),
        (9, 20, 16),
        (17, 20, 24),
        (32, 20, 32),
        # The largest number of rows with a graph is not padded beyond it.
        (102, 20, 102),
        (1, MAX_SIBLINGS, 1),
        (3, 600, 3),
    ],
)
def test_rows_are_padded_to_a_few_sizes(rows: int, k: int, padded: int) -> None:
    assert _sibling_pass._padded_rows(rows, k) == padded
    assert padded * k <= MAX_SIBLINGS


@pytest.mark.parametrize(
    ("columns", "capacity"), [(0, 1024), (1, 1024), (1024, 1024), (1025, 2048), (5000, 8192)]
)
def test_prefixes_are_prepared_for_a_few_lengths(columns: int, capacity: int) -> None:
    assert _sibling_pass._capacity(columns) == capacity


def test_what_padding_holds_changes_no_bit_of_the_rows(lm: Any, device: torch.device) -> None:
    ids = some_ids(3, 5, device)
    first = read(lm, cache_of(lm, TEXTS), ids)
    # A fourth row leaves its tokens, and a longer text its columns, where padding is read.
    texts = [*TEXTS, [11, 12, 13, 14, 15, 16, 17]]
    read(lm, cache_of(lm, texts), some_ids(4, 5, device))
    again = read(lm, cache_of(lm, TEXTS), ids)
    assert first.values.shape == (3, 5, HEADS)
    assert torch.equal(again.values, first.values)
    assert torch.equal(again.columns, first.columns)


@pytest.mark.parametrize("k", [1, 5, 700])
def test_the_pass_gives_the_values_of_masked_attention(
    lm: Any, device: torch.device, k: int
) -> None:
    """Compare also without padding, with more siblings than have buffers."""
    assert len(TEXTS) * 700 > MAX_SIBLINGS
    masked = TinyValueLM(device)
    ids = some_ids(3, k, device)
    values, columns = masked.siblings(ids, cache_of(masked, TEXTS).cache, [5, 2, 3])
    assert columns is None
    result = read(lm, cache_of(lm, TEXTS), ids)
    torch.testing.assert_close(result.values, values, atol=1e-5, rtol=1e-5)


def test_a_result_belongs_to_its_caller(lm: Any, device: torch.device) -> None:
    """Two batches of one value LM take turns, each between the candidates and the choice."""
    ids = some_ids(2, 4, device)
    first, second = cache_of(lm, [[1, 2], [3]]), cache_of(lm, [[4, 5, 6], [7, 8]])
    values = first.siblings(ids)
    kept = values.clone()
    second.siblings(ids.flip(0))
    assert torch.equal(values, kept)
    for cache, texts in ((first, [[1, 2], [3]]), (second, [[4, 5, 6], [7, 8]])):
        chosen = cache.candidates[:, 2]
        cache.choose(chosen)
        result = cache.siblings(ids)
        for row, text in enumerate(texts):
            expected = lm.value([*text, int(chosen[row]), int(ids[row, 0])])
            torch.testing.assert_close(result[row, 0], expected, atol=1e-5, rtol=1e-5)


def test_an_empty_text_is_continued(lm: Any, device: torch.device) -> None:
    cache = ValueCache(lm, [0], [0], RowCache())
    ids = torch.tensor([[3, 4]], device=device)
    values = cache.siblings(ids)
    torch.testing.assert_close(values[0, 1], lm.value([4]), atol=1e-5, rtol=1e-5)
    cache.choose(torch.tensor([4], device=device))
    torch.testing.assert_close(cache.siblings(ids)[0, 0], lm.value([4, 3]), atol=1e-5, rtol=1e-5)


def test_a_step_can_be_captured(lm: Any, device: torch.device) -> None:
    """It waits for nothing: a later step only replays it."""
    cache = cache_of(lm, TEXTS)
    ids = some_ids(3, 5, device)
    expected = read(lm, cache, ids)
    step = lm.sibling_pass._buffers.step(4, 5)
    forward = lm.sibling_pass._forward
    reading = SiblingReading(
        OwnColumns(step.columns), lm.sibling_pass._prefixes, step.lengths, 1024
    )
    positions = step.lengths[:, None].expand(-1, 5)
    keys = [each.keys for each in cache.cache.layers]
    values = [each.values for each in cache.cache.layers]
    with (
        lm.sibling_pass._prefixes.pointing_to(keys, values),
        reading_siblings(reading),
        WaitingCalls() as waiting,
    ):
        result = forward(step.ids, reading.cache, positions, step.mask)
    assert waiting.names == []
    assert torch.equal(result[:3], expected.values)


def layer(heads: int, dim: int, value_dim: int | None = None) -> DynamicLayer:
    result = DynamicLayer()
    result.update(torch.ones(1, heads, 1, dim), torch.ones(1, heads, 1, value_dim or dim))
    return result


def test_layers_that_differ_have_no_common_shape() -> None:
    assert CacheShape.of([layer(2, 8), layer(2, 8)]) == CacheShape(2, 2, 8, torch.float32)
    assert CacheShape.of([layer(2, 8), layer(1, 8)]) is None
    assert CacheShape.of([layer(2, 8), layer(2, 4)]) is None
    assert CacheShape.of([layer(2, 8, value_dim=4)]) is None


def test_a_model_without_such_a_shape_keeps_masked_attention(device: torch.device) -> None:
    plain = TinyValueLM(device)
    own_attention = plain.lm.config._attn_implementation
    for shape in (None, CacheShape(1, 1, 8, torch.float32)):
        plain.cell_shape = shape
        plain.use_sibling_pass("tiny")
        assert plain.sibling_pass is None
    assert plain.lm.config._attn_implementation == own_attention
