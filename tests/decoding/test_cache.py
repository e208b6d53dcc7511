"""Tests of the keys and values of a batch whose rows join and leave it."""

from __future__ import annotations

import torch

from infer_align.decoding.cache import GROWTH, RowCache

HEADS = 2
DIMENSIONS = 3
LAYERS = 2


def append(cache: RowCache, columns: torch.Tensor) -> None:
    """Append [B, columns] numbers as keys, and their negatives as values, to every layer."""
    keys = columns[:, None, :, None].expand(-1, HEADS, -1, DIMENSIONS)
    for layer in range(LAYERS):
        cache.update(keys + layer, -keys - layer, layer)


def filled(columns: torch.Tensor) -> RowCache:
    cache = RowCache()
    append(cache, columns)
    return cache


def expect(cache: RowCache, columns: torch.Tensor) -> None:
    """Check that the cache holds these columns in all layers."""
    assert cache.length == columns.shape[1]
    expected = columns[:, None, :, None].expand(-1, HEADS, -1, DIMENSIONS)
    for i, layer in enumerate(cache.layers):
        assert torch.equal(layer.keys, expected + i)
        assert torch.equal(layer.values, -expected - i)


def numbers(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    return torch.arange(float(rows * columns), device=device).view(rows, columns)


def test_an_empty_cache_has_no_columns() -> None:
    assert RowCache().length == 0
    assert RowCache().nbytes == 0


def test_columns_are_appended_past_the_first_buffer(device: torch.device) -> None:
    columns = numbers(2, 2 * GROWTH + 5, device)
    cache = filled(columns[:, :3])
    for i in range(3, columns.shape[1]):
        append(cache, columns[:, i : i + 1])
    expect(cache, columns)
    assert cache.nbytes == LAYERS * 2 * columns.numel() * HEADS * DIMENSIONS * 4


def test_rows_are_taken_in_any_order_and_more_than_once(device: torch.device) -> None:
    columns = numbers(3, 6, device)
    selection = filled(columns).take([2, 0, 2], 4)
    expect(selection, columns[[2, 0, 2], 2:])


def test_joining_pads_the_shorter_cache_with_zeros_on_the_left(device: torch.device) -> None:
    upper = numbers(2, 5, device) + 1
    lower = numbers(1, 2, device) + 100
    joined = filled(upper).join(filled(lower))
    assert joined.length == 5
    assert torch.equal(joined.layers[0].keys[:2, 0, :, 0], upper)
    assert joined.layers[0].keys[2, 0, :, 0].tolist() == [0, 0, 0, 100, 101]


def test_beginnings_are_right_aligned(device: torch.device) -> None:
    columns = numbers(1, 6, device)
    cache = filled(columns).beginnings([4, 2])
    assert cache.layers[0].keys[0, 0, :, 0].tolist() == [0, 1, 2, 3]
    assert cache.layers[0].keys[1, 0, 2:, 0].tolist() == [0, 1]
    assert cache.layers[0].keys.isfinite().all()
    assert filled(columns).beginnings([0, 0]).length == 0


def test_one_of_the_latest_columns_stays_in_each_row(device: torch.device) -> None:
    columns = numbers(2, 7, device)
    cache = filled(columns)
    cache.keep_one(4, torch.tensor([2, 0], device=device))
    rows = [[0, 1, 2, 3, 6], [7, 8, 9, 10, 11]]
    expect(cache, torch.tensor(rows, dtype=torch.float32, device=device))


def test_the_newest_column_can_be_dropped_and_overwritten(device: torch.device) -> None:
    columns = numbers(3, 4, device)
    cache = filled(columns)
    other = filled(numbers(1, 2, device) + 50)
    cache.overwrite_last([1], other)
    expected = columns.clone()
    expected[1, -1] = 51
    expect(cache, expected)
    cache.drop_last()
    expect(cache, expected[:, :-1])
