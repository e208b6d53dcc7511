"""Value steering by heads in one call that selects, values, centres and adds.

`steering.py` takes this path where the call is compiled for the device and logits may be
overwritten: for the rows that only heads steer, with up to MAX_CANDIDATES candidates or with their
likely tokens valued.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from infer_align.decoding.dense_steering import DENSE
from infer_align.decoding.device import upload
from infer_align.values.head import HeadStack, HeadValue
from infer_align_kernels import SteeredRows, Workspace, steer_logits
from infer_align_kernels.top_candidates import MAX_CANDIDATES


@dataclass(slots=True)
class FusedSteerer:
    """The memory and the heads that fused steering keeps between the steps of an engine.

    Attributes:
        workspace: memory for the kernels.
        stack: the heads of the latest batch, stacked.
    """

    workspace: Workspace = field(default_factory=Workspace)
    stack: HeadStack | None = None
    # The heads of the stack, in the order of the batch's columns.
    _heads: tuple[HeadValue, ...] = ()

    def stack_of(self, heads: tuple[HeadValue, ...]) -> HeadStack:
        """Return these heads, stacked; the same object until the heads change."""
        if self.stack is None or self._heads != heads:
            self.stack = HeadStack(heads)
            self._heads = heads
        return self.stack


@dataclass(frozen=True, slots=True, eq=False)
class FusedSteering:
    """Steering of S rows by M heads.

    Attributes:
        rows: [S] indices of the rows of the logits; None if all rows are in the batch, in order.
        steered: the record of each row.
        stack: the M heads.
        workspace: memory for the kernels.
    """

    rows: torch.Tensor | None
    steered: SteeredRows
    stack: HeadStack
    workspace: Workspace

    @classmethod
    def build(
        cls,
        steerer: FusedSteerer,
        heads: Sequence[HeadValue],
        beta: NDArray[np.float32],
        top_k: NDArray[np.int64],
        min_p: NDArray[np.float32],
        masked: NDArray[np.bool_],
        device: torch.device,
        rows: NDArray[np.int64] | None,
    ) -> FusedSteering | None:
        """Build the record from host arrays without waiting for the device.

        Args:
            steerer: what is kept between steps.
            heads: the M heads.
            beta: [S, M] weights.
            top_k: [S] candidates of each row; DENSE for a row without a fixed number of them.
            min_p: [S] for the rows that are DENSE; 0 for all tokens. Rows for which `is_fused` is
                False are left out.
            masked: [S] True where the tail is masked.
            device: where the logits are.
            rows: [S] indices of the rows in the logits; None for all.

        Returns:
            The record; None if it would have no row.
        """
        selected = is_fused(top_k, min_p)
        if not heads or not selected.any():
            return None
        stack = steerer.stack_of(tuple(heads))
        order = [heads.index(head) for head in stack.heads]
        counts = np.where(selected, top_k, 0)
        has_likely = bool((counts == DENSE).any())
        table = np.empty((len(counts), SteeredRows.COLUMNS + len(heads)), np.int32)
        table[:, 0] = np.arange(len(counts)) if rows is None else rows
        table[:, 1] = np.where(counts == DENSE, SteeredRows.LIKELY, counts)
        table[:, 2] = masked
        with np.errstate(divide="ignore"):
            table[:, 3] = np.log(min_p).view(np.int32)
        table[:, SteeredRows.COLUMNS :] = beta[:, order].view(np.int32)
        k = int(counts.max(initial=0))
        steered = SteeredRows(upload(table, device), k, has_likely=has_likely)
        device_rows = None if rows is None else upload(rows, device)
        return cls(device_rows, steered, stack, steerer.workspace)

    @classmethod
    def build_on_device(
        cls,
        steerer: FusedSteerer,
        heads: Sequence[HeadValue],
        beta: torch.Tensor,
        top_k: torch.Tensor,
        min_p: torch.Tensor | None,
        masked: torch.Tensor | None,
        k: int,
    ) -> FusedSteering:
        """Build the record for all rows of the logits from tensors that the host has not read.

        Args:
            steerer: what is kept between steps.
            heads: the M heads.
            beta: [B, M] weights.
            top_k: [B] candidates of each row, as for `build`.
            min_p: [B] for the rows that are DENSE; None if no row has its likely tokens valued.
            masked: [B] True where the tail is masked; None if no row masks it.
            k: an upper bound of `top_k`; 0 if every steered row is DENSE.
        """
        stack = steerer.stack_of(tuple(heads))
        order = torch.tensor([heads.index(head) for head in stack.heads])
        counts = torch.where((top_k > 0) & (top_k <= MAX_CANDIDATES), top_k, 0)
        limits = torch.zeros_like(beta[:, 0], dtype=torch.float32)
        if min_p is not None:
            counts = torch.where((top_k == DENSE) & (min_p > 0), SteeredRows.LIKELY, counts)
            limits = min_p.float().log()
        indices = torch.arange(len(counts), device=counts.device)
        flags = torch.zeros_like(counts) if masked is None else masked.to(counts.dtype)
        columns = torch.stack([indices, counts, flags], dim=1).to(torch.int32)
        weights = beta.float().index_select(1, upload(order.numpy(), beta.device))
        numbers = torch.cat([limits[:, None], weights], dim=1).view(torch.int32)
        table = torch.cat([columns, numbers], dim=1)
        steered = SteeredRows(table, min(k, MAX_CANDIDATES), has_likely=min_p is not None)
        return cls(None, steered, stack, steerer.workspace)

    def add(self, logits: torch.Tensor, hidden: torch.Tensor) -> None:
        """Steer the rows in place.

        Args:
            logits: [B, V] float32, overwritten.
            hidden: [B, d] states that the output layer read.
        """
        states = hidden if self.rows is None else hidden.index_select(0, self.rows)
        features = self.stack.features(states.float())
        steer_logits(logits, features, self.stack.table, self.steered, self.workspace)


def is_fused(top_k: NDArray[np.int64], min_p: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return True for the rows that the fused call steers. [S], [S] -> [S]."""
    has_number = (top_k > 0) & (top_k <= MAX_CANDIDATES)
    has_likely = (top_k == DENSE) & (min_p > 0)
    fused: NDArray[np.bool_] = has_number | has_likely
    return fused
