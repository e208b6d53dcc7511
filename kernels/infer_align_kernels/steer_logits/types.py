"""The weights of several heads, the steering of rows, and the memory that calls share.

Shapes: M heads, V vocabulary, r rank of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from infer_align_kernels.devices import runs_triton
from infer_align_kernels.top_candidates import MAX_CANDIDATES


class HeadTable:
    """The weights and biases of M heads by address, so that one kernel reads them all.

    Attributes:
        weights: M tensors [V, r] float32; contiguous for a kernel of Triton. The ranks may differ.
        biases: M tensors [V] float32; contiguous for a kernel of Triton.
        addresses: [2, M] int64: addresses of the weights, then of the biases.
        ranks: [2, M] int32: the rank of each head, then the place of its first feature.
    """

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> None:
        """Take the weights and biases of one or more heads.

        Raises:
            ValueError: a tensor is not float32, not contiguous or of another shape.
        """
        # The tensors have to live as long as their addresses.
        self.weights = tuple(weights)
        self.biases = tuple(biases)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            _check_head(weight, bias, self.weights[0])
        device = self.weights[0].device
        rows = [
            [weight.data_ptr() for weight in self.weights],
            [bias.data_ptr() for bias in self.biases],
        ]
        self.addresses = torch.tensor(rows, dtype=torch.int64).to(device)
        ranks = [weight.shape[1] for weight in self.weights]
        places = [sum(ranks[:m]) for m in range(len(ranks))]
        self.ranks = torch.tensor([ranks, places], dtype=torch.int32).to(device)

    def __len__(self) -> int:
        """Return the number of heads."""
        return len(self.weights)

    @cached_property
    def packed(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return one table for a CPU, and the places of the heads in its columns.

        Returns:
            [V, features + M] the weights of all heads, then their biases; [M + 1] the first column
            of each head, then the number of features.
        """
        biases = torch.stack(self.biases, dim=1)
        table = torch.cat([*self.weights, biases], dim=1)
        ranks = [0, *(weight.shape[1] for weight in self.weights)]
        return table.numpy(), np.cumsum(ranks)

    @cached_property
    def features(self) -> int:
        """Return the features of a row: the sum of all ranks."""
        return sum(weight.shape[1] for weight in self.weights)


def _check_head(weight: torch.Tensor, bias: torch.Tensor, first: torch.Tensor) -> None:
    fits = weight.ndim == 2 and weight.shape[0] == first.shape[0] and bias.shape == first.shape[:1]
    if not fits:
        raise ValueError(
            f"weights, biases: shapes {tuple(weight.shape)} and {tuple(bias.shape)} are not "
            f"allowed; must be [{first.shape[0]}, r] and [{first.shape[0]}]."
        )
    for tensor in (weight, bias):
        has_layout = tensor.is_contiguous() or not runs_triton(tensor.device)
        if tensor.dtype != torch.float32 or not has_layout:
            raise ValueError(
                "weights, biases: must be torch.float32 and contiguous, because the kernel reads "
                "them by address."
            )


class SteeredRows:
    """The steering of S rows in one tensor, so that one copy brings it to the device.

    Attributes:
        table: [S, 4 + M] int32: the row of the logits; its number of candidates, LIKELY for all
            tokens that are likely enough, and 0 for a row that stays the same; 1 if its other
            tokens are masked; and as the bits of float32: the smallest logprob of a likely token,
            relative to the likeliest one, and the M weights.
        k: the largest number of candidates; 0 if no row has a number of them.
        has_likely: False only if no row is LIKELY.
    """

    # The columns before the weights.
    COLUMNS = 4
    # The number of candidates of a row whose candidates are its likely tokens.
    LIKELY = -1

    def __init__(self, table: torch.Tensor, k: int, *, has_likely: bool = False) -> None:
        """Take the tensor.

        Raises:
            ValueError: k is outside 0..MAX_CANDIDATES.
        """
        if not 0 <= k <= MAX_CANDIDATES:
            raise ValueError(f"k: {k} is not allowed; must be in 0..{MAX_CANDIDATES}.")
        self.table = table
        self.k = k
        self.has_likely = has_likely

    @cached_property
    def numbers(self) -> torch.Tensor:
        """Return the memory of the table as float32. [S, 4 + M]."""
        return self.table.view(torch.float32)

    @cached_property
    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the table on a CPU as integers, and the same memory as float32."""
        records = self.table.contiguous().numpy()
        return records, records.view(np.float32)

    @property
    def log_min_p(self) -> torch.Tensor:
        """Return the smallest relative logprobs. [S] float32."""
        return self.numbers[:, self.COLUMNS - 1]

    @property
    def beta(self) -> torch.Tensor:
        """Return the weights. [S, M] float32."""
        return self.numbers[:, self.COLUMNS :]


class Workspace:
    """Memory that the calls on one stream share. It grows to the largest call.

    Memory that it has outgrown is kept, because a CUDA graph of an earlier call still writes there.
    """

    def __init__(self) -> None:
        """Take no memory before the first call."""
        self._memory = [torch.empty(0, dtype=torch.int32)]

    def take(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """Return [rows, columns] int32 of undefined content; the previous call's is overwritten."""
        size = rows * columns
        memory = self._memory[-1]
        if memory.numel() < size or memory.device != device:
            # Twice as much each time, so that all earlier memory together is at most as large.
            grown = max(size, 2 * memory.numel())
            memory = torch.empty(grown, dtype=torch.int32, device=device)
            self._memory.append(memory)
        return memory[:size].view(rows, columns)
