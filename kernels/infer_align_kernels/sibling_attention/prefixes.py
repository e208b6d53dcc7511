"""The prefixes of all layers by address, so that one captured launch reads whatever is set later.

Shapes: B rows, Hkv key heads, T columns, D numbers per head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from infer_align_kernels.devices import staged

# The numbers of one layer in the table: the addresses of its keys and of its values, their strides
# by row and head, and the number of columns. A kernel is compiled once for all layers if their rows
# are aligned alike, so the sixth number is not used.
LAYER = 6
# Bytes of one load of a GPU's thread, to which addresses and heads are aligned.
ALIGNED_BYTES = 16


class PrefixTable:
    """The keys and values of every layer by address: [layers, LAYER] int64 on the device.

    A kernel reads the addresses when it runs. So a launch in a CUDA graph follows `pointing_to`.

    Attributes:
        entries: the table on the device. Its own address stays the same.
        dtype: of the keys and values.
        dim: numbers per head.
        keys: while they are pointed to, [B, Hkv, T, D] of each layer; so are `values`.
    """

    def __init__(self, layers: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.entries = torch.zeros((layers, LAYER), dtype=torch.int64, device=device)
        self.dtype = dtype
        self.dim = dim
        self.keys: tuple[torch.Tensor, ...] = ()
        self.values: tuple[torch.Tensor, ...] = ()

    @property
    def stride_unit(self) -> int:
        """Return a power of two, at most 16, that divides every stride."""
        return math.gcd(self.dim, 16)

    @property
    def is_aligned(self) -> bool:
        """Return True if every head begins at a multiple of ALIGNED_BYTES."""
        return self.dim * self.dtype.itemsize % ALIGNED_BYTES == 0

    @contextmanager
    def pointing_to(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
    ) -> Iterator[None]:
        """Let the kernels that are launched in this context read these tensors.

        What is launched reads them in the order of the stream. So they may be freed afterwards.

        Args:
            keys: [B, Hkv, T, D] of each layer, right-aligned.
            values: [B, Hkv, T, D] of each layer.

        Raises:
            ValueError: a tensor is of another dtype, its heads are not as the table's, or the keys
                and values of a layer differ in their shapes or strides.
        """
        rows: NDArray[np.int64] = np.zeros(tuple(self.entries.shape), np.int64)
        for layer, (layer_keys, layer_values) in enumerate(zip(keys, values, strict=True)):
            self._check(layer_keys, layer_values)
            strides = layer_keys.stride()[:2]
            addresses = (layer_keys.data_ptr(), layer_values.data_ptr())
            rows[layer, :5] = [*addresses, *strides, layer_keys.shape[2]]
        self.keys, self.values = tuple(keys), tuple(values)
        self.entries.copy_(staged(rows, self.entries.device), non_blocking=True)
        try:
            yield
        finally:
            self.keys, self.values = (), ()

    def _check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        for tensor in (keys, values):
            if tensor.dtype != self.dtype or tensor.device != self.entries.device:
                raise ValueError(
                    f"prefix: {tensor.dtype} on {tensor.device} does not fit the table; must be "
                    f"{self.dtype} on {self.entries.device}."
                )
        strides = keys.stride()
        # Heads that are not aligned would be read in pieces that the kernel does not make.
        is_misplaced = self.is_aligned and (keys.data_ptr() | values.data_ptr()) % ALIGNED_BYTES
        has_gaps = strides[2:] != (self.dim, 1)
        has_gaps = has_gaps or any(stride % self.stride_unit for stride in strides[:2])
        is_alike = (values.shape, values.stride()) == (keys.shape, strides)
        if not keys.numel() and keys.shape[3] == self.dim:
            return
        if keys.shape[3] != self.dim or is_misplaced or has_gaps or not is_alike:
            raise ValueError(
                f"prefix: shape {tuple(keys.shape)} with strides {strides} does not fit the table; "
                f"must have contiguous columns of {self.dim} numbers, and values like the keys."
            )
