"""Keys and values of a running batch whose rows come and go.

Rows are right-aligned: the newest token of every row stands in the same column, so that one step appends one column to all, and any
model that takes left-padded batches takes these.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

# Columns are allocated this many at a time, so that a step writes in place instead of copying the cache.
GROWTH = 64


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values, [B, heads, columns, dim], in buffers with room for further columns."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.columns = 0
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append columns; -> all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.columns + key_states.shape[-2]
        if self._keys is None or self._values is None or end > self._keys.shape[-2]:
            self._keys = _room(self._keys, key_states, self.columns, end)
            self._values = _room(self._values, value_states, self.columns, end)
        self._keys[:, :, self.columns : end] = key_states
        self._values[:, :, self.columns : end] = value_states
        self._show(end)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.columns

    def assign(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hold these columns from now on."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self._keys, self._values = keys, values
        self._show(keys.shape[-2])

    def keep_one(self, columns: int, chosen: torch.Tensor) -> None:
        """Of the columns from `columns` on, keep in each row the one at offset chosen[row], as column `columns`."""
        rows = torch.arange(len(chosen), device=chosen.device)
        for buffer in (self._keys, self._values):
            assert buffer is not None
            buffer[:, :, columns] = buffer[rows, :, columns + chosen]
        self._show(columns + 1)

    def drop_last(self) -> None:
        """Forget the newest column."""
        self._show(self.columns - 1)

    def _show(self, columns: int) -> None:
        assert self._keys is not None
        assert self._values is not None
        self.columns = columns
        self.keys = self._keys[:, :, :columns]
        self.values = self._values[:, :, :columns]


class RowCache(Cache):  # type: ignore[misc]
    """The rows of one running batch."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=GrowingLayer)

    @property
    def length(self) -> int:
        """Columns in use, the same in every layer: the tokens of the longest row."""
        return int(self.layers[0].columns) if self.layers else 0

    @property
    def nbytes(self) -> int:
        """Memory of the columns in use."""
        return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in self.layers)

    def take(self, rows: list[int], columns: int) -> RowCache:
        """The last `columns` columns of these rows, in this order; a row may be taken more than once."""
        taken = RowCache()
        for layer in self.layers:
            index = torch.tensor(rows, device=layer.keys.device)
            start = self.length - columns
            taken.layers.append(GrowingLayer())
            taken.layers[-1].assign(layer.keys[index, :, start:], layer.values[index, :, start:])
        return taken

    def beginnings(self, lengths: list[int]) -> RowCache:
        """The only row's first lengths[i] columns, as row i."""
        taken, width = RowCache(), max(lengths)
        for layer in self.layers if width else ():
            device = layer.keys.device
            shift = torch.tensor([width - length for length in lengths], device=device)
            index = (torch.arange(width, device=device)[None] - shift[:, None]).clamp(
                min=0
            )  # padding is masked, and finite
            taken.layers.append(GrowingLayer())
            taken.layers[-1].assign(
                layer.keys[0][:, index].transpose(0, 1), layer.values[0][:, index].transpose(0, 1)
            )
        return taken

    def keep_one(self, columns: int, chosen: torch.Tensor) -> None:
        """Of the columns from `columns` on, keep in each row the one at offset chosen[row]."""
        for layer in self.layers:
            layer.keep_one(columns, chosen)

    def drop_last(self) -> None:
        """Forget the newest column."""
        for layer in self.layers:
            layer.drop_last()

    def overwrite_last(self, rows: list[int], other: RowCache) -> None:
        """Put the newest column of each of the other's rows in the place of these rows' newest."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.keys[rows, :, -1] = theirs.keys[:, :, -1]
            mine.values[rows, :, -1] = theirs.values[:, :, -1]

    def join(self, other: RowCache) -> RowCache:
        """These rows, then the other's; the shorter of the two is padded on the left."""
        joined = RowCache()
        width = max(self.length, other.length)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            joined.layers.append(GrowingLayer())
            joined.layers[-1].assign(
                _stack(mine.keys, theirs.keys, width), _stack(mine.values, theirs.values, width)
            )
        return joined


def _room(buffer: torch.Tensor | None, like: torch.Tensor, used: int, needed: int) -> torch.Tensor:
    rows, heads, _, dim = like.shape
    bigger = like.new_zeros((rows, heads, needed + GROWTH, dim))
    if buffer is not None:
        bigger[:, :, :used] = buffer[:, :, :used]
    return bigger


def _stack(upper: torch.Tensor, lower: torch.Tensor, width: int) -> torch.Tensor:
    rows = upper.shape[0]
    # Zeros, not empty: padding is masked, but a NaN left in memory would come through even a weight of 0.
    stacked = upper.new_zeros((rows + lower.shape[0], upper.shape[1], width, upper.shape[3]))
    stacked[:rows, :, width - upper.shape[2] :] = upper
    stacked[rows:, :, width - lower.shape[2] :] = lower
    return stacked
