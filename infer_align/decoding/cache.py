"""Keys and values of a running batch whose rows join and leave it.

Rows are right-aligned: the newest token of every row is in the last column. So one step appends one
column to all rows, and any model that accepts left-padded batches accepts these.

        column   0    1    2    3
    row 0        a    b    c    d
    row 1      pad  pad    x    y      the next step writes column 4 of both rows

A column is the place of one token. Padding holds finite numbers that attention masks out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

# Buffers grow by this many columns at a time, so that most steps write in place.
GROWTH = 64
# The buffer of a layer until its first columns arrive, which set the type and the device.
_NO_COLUMNS = torch.empty((0, 0, 0, 0))


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, in buffers with room for more. [B, heads, columns, dim].

    Attributes:
        columns: the number of columns in use.
        keys: a view of the used columns of the buffer; so is `values`.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.columns = 0
        self._key_buffer = _NO_COLUMNS
        self._value_buffer = _NO_COLUMNS

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append columns; return the keys and values of all columns. A model calls it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.columns + key_states.shape[-2]
        if end > self._key_buffer.shape[-2]:
            self._key_buffer = _enlarged(self._key_buffer, key_states, self.columns, end)
            self._value_buffer = _enlarged(self._value_buffer, value_states, self.columns, end)
        self._key_buffer[:, :, self.columns : end] = key_states
        self._value_buffer[:, :, self.columns : end] = value_states
        self._use(end)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the number of columns in use."""
        return self.columns

    def assign(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replace the columns by these."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self._key_buffer = keys
        self._value_buffer = values
        self._use(keys.shape[-2])

    def keep_one(self, columns: int, rows: torch.Tensor, chosen: torch.Tensor) -> None:
        """Keep `columns` columns and, of those after them, one of each row.

        Args:
            columns: number of columns that stay.
            rows: [B] 0, 1, ..., B - 1.
            chosen: [B] the column of each row that follows them.
        """
        for buffer in (self._key_buffer, self._value_buffer):
            buffer[:, :, columns] = buffer[rows, :, chosen]
        self._use(columns + 1)

    def drop_last(self) -> None:
        """Drop the newest column."""
        self._use(self.columns - 1)

    def _use(self, columns: int) -> None:
        """Set the number of columns in use. What the buffers hold after them is ignored."""
        self.columns = columns
        self.keys = self._key_buffer[:, :, :columns]
        self.values = self._value_buffer[:, :, :columns]


class RowCache(Cache):  # type: ignore[misc]
    """Keys and values of the rows of one batch, in all layers. A new one is empty."""

    layers: list[GrowingLayer]

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=GrowingLayer)

    @property
    def length(self) -> int:
        """Return the number of columns in use: the tokens of the longest row."""
        return int(self.layers[0].columns) if self.layers else 0

    @property
    def nbytes(self) -> int:
        """Return the bytes of the columns in use."""
        return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in self.layers)

    def _append_layer(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add the next layer with these columns."""
        layer = GrowingLayer()
        layer.assign(keys, values)
        self.layers.append(layer)

    def take(self, rows: list[int], columns: int) -> RowCache:
        """Return the last `columns` columns of these rows, in this order. Rows may repeat."""
        selection = RowCache()
        if not self.layers:
            return selection
        start = self.length - columns
        index = torch.tensor(rows, device=self.layers[0].keys.device)
        for layer in self.layers:
            selection._append_layer(layer.keys[index, :, start:], layer.values[index, :, start:])
        return selection

    def beginnings(self, lengths: list[int], width: int | None = None) -> RowCache:
        """Return a cache whose row i is the first lengths[i] columns of this cache's only row.

        Args:
            lengths: columns of each row.
            width: columns of the result, at least the largest length; by default that length.
        """
        selection = RowCache()
        width = max(lengths) if width is None else width
        if not width:
            return selection
        for layer in self.layers:
            device = layer.keys.device
            padding = torch.tensor([width - length for length in lengths], device=device)
            # index[i, c] is the column of the source for column c of row i. Padding repeats the
            # first column: it is masked, but has to be finite.
            columns = torch.arange(width, device=device)
            index = (columns[None] - padding[:, None]).clamp(min=0)
            # [heads, rows, width, dim] -> [rows, heads, width, dim]
            keys = layer.keys[0][:, index].transpose(0, 1)
            values = layer.values[0][:, index].transpose(0, 1)
            selection._append_layer(keys, values)
        return selection

    @classmethod
    def stack(cls, caches: Sequence[RowCache]) -> RowCache:
        """Return the rows of caches of one width, one after the other."""
        stacked = cls()
        for layers in zip(*(cache.layers for cache in caches), strict=True):
            keys = torch.cat([layer.keys for layer in layers])
            values = torch.cat([layer.values for layer in layers])
            stacked._append_layer(keys, values)
        return stacked

    def keep_one(self, columns: int, chosen: torch.Tensor) -> None:
        """Keep `columns` columns and, of those after them, the one at offset chosen[row]."""
        rows = torch.arange(len(chosen), device=chosen.device)
        chosen_columns = columns + chosen
        for layer in self.layers:
            layer.keep_one(columns, rows, chosen_columns)

    def append_chosen(self, columns: torch.Tensor, chosen: torch.Tensor) -> None:
        """Append one of several columns to each row.

        Args:
            columns: [layers, 2, B, heads, k, dim] keys and values of k columns per row.
            chosen: [B] the offset of each row's column among them.
        """
        if not self.layers:
            self.layers = [GrowingLayer() for _ in columns]
        rows = torch.arange(len(chosen), device=chosen.device)
        # [B, layers, 2, heads, dim] -> [layers, 2, B, heads, 1, dim]
        new_columns = columns[:, :, rows, :, chosen].permute(1, 2, 0, 3, 4).unsqueeze(-2)
        for layer, (keys, values) in zip(self.layers, new_columns, strict=True):
            layer.update(keys, values)

    def drop_last(self) -> None:
        """Drop the newest column."""
        for layer in self.layers:
            layer.drop_last()

    def overwrite_last(self, rows: list[int], other: RowCache) -> None:
        """Overwrite the newest column of these rows with the newest columns of the other's rows."""
        for layer, source in zip(self.layers, other.layers, strict=True):
            layer.keys[rows, :, -1] = source.keys[:, :, -1]
            layer.values[rows, :, -1] = source.values[:, :, -1]

    def join(self, other: RowCache) -> RowCache:
        """Return these rows followed by the other's. The shorter cache is padded on the left."""
        joined = RowCache()
        width = max(self.length, other.length)
        for upper, lower in zip(self.layers, other.layers, strict=True):
            keys = _right_aligned(upper.keys, lower.keys, width)
            values = _right_aligned(upper.values, lower.values, width)
            joined._append_layer(keys, values)
        return joined


def _enlarged(buffer: torch.Tensor, like: torch.Tensor, used: int, needed: int) -> torch.Tensor:
    """Copy the used columns of a buffer to one with room for `needed` columns and more."""
    rows, heads, _, dim = like.shape
    larger = like.new_zeros((rows, heads, needed + GROWTH, dim))
    if used:
        larger[:, :, :used] = buffer[:, :, :used]
    return larger


def _right_aligned(upper: torch.Tensor, lower: torch.Tensor, width: int) -> torch.Tensor:
    """Stack the rows of two tensors, each padded on the left to `width` columns.

    [U, heads, columns, dim], [L, heads, other columns, dim] -> [U + L, heads, width, dim].
    """
    rows, heads, upper_columns, dim = upper.shape
    other_rows, _, lower_columns, _ = lower.shape
    # Zeros instead of empty memory: a masked NaN would still spoil the attention's sum.
    stacked = upper.new_zeros((rows + other_rows, heads, width, dim))
    stacked[:rows, :, width - upper_columns :] = upper
    stacked[rows:, :, width - lower_columns :] = lower
    return stacked
