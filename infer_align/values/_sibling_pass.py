"""The forward pass of a value LM over the siblings of each row, in buffers that stay in place.

A step copies its tokens and lengths to the buffers and runs the pass. On CUDA the pass is replayed
from a graph, so the host issues one operation in place of several hundred. Elsewhere the same pass
runs eagerly on the same buffers. The rows are padded to a few sizes, so that a few graphs serve all
batches. Padding has no prefix and changes no other row.

Shapes: R rows, B rows with padding, k siblings, H heads of the value LM, L layers, Hkv key heads, D
numbers per head.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from infer_align.values._sibling_reading import OwnColumns, SiblingReading, reading_siblings
from infer_align.values._step_graphs import StepGraphs
from infer_align_kernels import PrefixTable, staged

# Siblings of a pass with padding and a graph. With more, the GPU takes longer than the host needs
# to issue the operations, and padding and buffers would cost more than a graph saves.
MAX_SIBLINGS = 2048
# The fewest columns for which a pass is prepared.
MIN_CAPACITY = 1024
# From this number of rows on, they are padded to a multiple of it.
ROWS_UNIT = 8

# Computes [B, k, H] values from ids [B, k], a cache of transformers, positions [B, k] and a mask.
Forward = Callable[[torch.Tensor, Any, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The keys and values of one token in a value LM whose layers are alike.

    Attributes:
        layers: number of layers.
        kv_heads: key heads per layer.
        dim: numbers per head.
        dtype: of the numbers.
    """

    layers: int
    kv_heads: int
    dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, layers: Sequence[Any]) -> CacheShape | None:
        """Return the shape of the layers of a cache with one token; None if they differ."""
        shapes: set[CacheShape] = set()
        for layer in layers:
            for tensor in (layer.keys, layer.values):
                if tensor.ndim != 4:
                    return None
                shapes.add(cls(len(layers), tensor.shape[1], tensor.shape[3], tensor.dtype))
        return shapes.pop() if len(shapes) == 1 else None


class ReadSiblings(NamedTuple):
    """The result of a pass. It is the caller's: no later pass changes it.

    Attributes:
        values: [R, k, H] float32.
        columns: [L, 2, R, Hkv, k, D] the siblings' own keys and values.
    """

    values: torch.Tensor
    columns: torch.Tensor


class _Step(NamedTuple):
    """The tensors that a pass of one size reads and writes.

    Attributes:
        ids: [B, k].
        lengths: [B], 0 for padding.
        mask: [B, 1, 1, 1] True: transformers passes a mask of four dimensions on as it is, and the
            kernel does not read it.
        values: [B, k, H] float32.
        columns: [L, 2, B, Hkv, k, D] the siblings' own keys and values.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor
    values: torch.Tensor
    columns: torch.Tensor


class _Buffers:
    """Memory for passes of up to N siblings. A size has the same addresses at each use."""

    def __init__(self, siblings: int, heads: int, shape: CacheShape, device: torch.device) -> None:
        self._heads = heads
        self._shape = shape
        self._ids = torch.zeros(siblings, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(siblings, dtype=torch.int64, device=device)
        self._mask = torch.ones(siblings, dtype=torch.bool, device=device)
        self._values = torch.zeros(siblings * heads, device=device)
        numbers = siblings * shape.layers * 2 * shape.kv_heads * shape.dim
        self._columns = torch.zeros(numbers, dtype=shape.dtype, device=device)

    def step(self, rows: int, k: int) -> _Step:
        """Return the tensors of a pass over so many rows, padding included."""
        shape = self._shape
        size = (shape.layers, 2, rows, shape.kv_heads, k, shape.dim)
        return _Step(
            self._ids[: rows * k].view(rows, k),
            self._lengths[:rows],
            self._mask[:rows].view(rows, 1, 1, 1),
            self._values[: rows * k * self._heads].view(rows, k, self._heads),
            self._columns[: math.prod(size)].view(size),
        )


class SiblingPass:
    """The pass of one value LM. Its methods may be called in any thread.

    Attributes:
        graphs: of the pass, by its size.
    """

    def __init__(
        self, name: str, forward: Forward, heads: int, shape: CacheShape, device: torch.device
    ) -> None:
        """Take the forward pass.

        Args:
            name: of the value LM, for a warning.
            forward: computes the values.
            heads: of the value LM.
            shape: of its keys and values.
            device: where it is.
        """
        self._forward = forward
        self._heads = heads
        self._shape = shape
        self._device = device
        self._prefixes = PrefixTable(shape.layers, shape.dim, shape.dtype, device)
        self.graphs = StepGraphs(name, device)
        # Made at the first use.
        self._buffers: _Buffers | None = None
        # Two threads would write to the same buffers.
        self._running = threading.Lock()

    @torch.inference_mode()
    def read(self, ids: torch.Tensor, cache: Any, lengths: Sequence[int]) -> ReadSiblings:
        """Value the siblings of each row.

        Args:
            ids: [R, k].
            cache: transformers cache of the earlier tokens, right-aligned.
            lengths: tokens of each row in the cache.
        """
        rows, k = ids.shape
        with self._running:
            if not 0 < rows * k <= MAX_SIBLINGS:
                # The buffers are new, so no graph can know them.
                step = self._make_buffers(rows * k).step(rows, k)
                self._run(step, ids, cache, lengths, graphs=None)
                return ReadSiblings(step.values, step.columns)
            if self._buffers is None:
                self._buffers = self._make_buffers(MAX_SIBLINGS)
            step = self._buffers.step(_padded_rows(rows, k), k)
            self._run(step, ids, cache, lengths, self.graphs)
            return ReadSiblings(step.values[:rows].clone(), step.columns[:, :, :rows].clone())

    def _make_buffers(self, siblings: int) -> _Buffers:
        return _Buffers(siblings, self._heads, self._shape, self._device)

    def _run(
        self,
        step: _Step,
        ids: torch.Tensor,
        cache: Any,
        lengths: Sequence[int],
        graphs: StepGraphs | None,
    ) -> None:
        rows, k = ids.shape
        # The padding has tokens of an earlier step, or the first token of the vocabulary.
        step.ids[:rows] = ids
        padded = np.zeros(len(step.lengths), np.int64)
        padded[:rows] = lengths
        step.lengths.copy_(staged(padded, self._device), non_blocking=True)
        keys, values = self._prefix(cache, rows)
        capacity = _capacity(keys[0].shape[2])
        reading = SiblingReading(OwnColumns(step.columns), self._prefixes, step.lengths, capacity)

        def run() -> None:
            positions = step.lengths[:, None].expand(-1, k)
            with reading_siblings(reading):
                step.values.copy_(self._forward(step.ids, reading.cache, positions, step.mask))

        with self._prefixes.pointing_to(keys, values):
            if graphs is None:
                run()
            else:
                graphs.run((len(step.ids), k, capacity), run)

    def _prefix(self, cache: Any, rows: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the keys and values of each layer. An empty text has no layers yet."""
        if cache.layers:
            return [layer.keys for layer in cache.layers], [each.values for each in cache.layers]
        shape = self._shape
        size = (rows, shape.kv_heads, 0, shape.dim)
        empty = [torch.empty(size, dtype=shape.dtype, device=self._device)] * shape.layers
        return empty, empty


def _padded_rows(rows: int, k: int) -> int:
    """Return the next number of rows for which passes are prepared: 1, 2, 4, 8, 16, 24, ..."""
    if rows <= ROWS_UNIT:
        padded = 1 << (rows - 1).bit_length()
    else:
        padded = math.ceil(rows / ROWS_UNIT) * ROWS_UNIT
    return min(padded, max(rows, MAX_SIBLINGS // k))


def _capacity(columns: int) -> int:
    """Return the next number of columns for which passes are prepared, a power of two."""
    return max(MIN_CAPACITY, 1 << (columns - 1).bit_length()) if columns else MIN_CAPACITY
