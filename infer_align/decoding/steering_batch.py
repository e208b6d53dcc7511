"""The record of one step of steering: which rows are steered, by which values, and how.

Each engine builds it from its own rows; `steering.py` does the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from infer_align.decoding.dense_steering import DENSE, DenseSteering
from infer_align.decoding.device import upload
from infer_align.decoding.fused_steering import FusedSteerer, FusedSteering, is_fused
from infer_align.decoding.kl_limit import KLLimit
from infer_align.values import Value
from infer_align.values.head import HeadValue
from infer_align.values.lookahead import LookaheadValue
from infer_align_kernels.top_candidates import MAX_CANDIDATES


@dataclass(frozen=True, slots=True, eq=False)
class SteeringBatch:
    """Steering of one step: S rows, M values, at most k candidates per row.

    The record is valid while the rows stay the same.

    Attributes:
        rows: [S] indices of the steered rows of the logits; None if all rows are in the batch.
        values: the M values.
        users: for each value, the indices among the S rows that it steers; None for all S.
        beta: [S, M] weights; 0 where a value does not steer a row.
        unused_slots: [S, k] True in slots past the row's own top_k; None if no row has such slots.
        tail: [S] True where tokens outside the candidates are masked; "keep" if no row masks them.
        k: the largest top_k of the rows.
        dense: the rows without a fixed number of candidates; None if there are none.
        fused: the rows that one call steers; None if there are none. They have no candidates here.
        kl_limit: the rows whose divergence from the frozen model is limited; None if none is.
        sibling_count: how many of the k candidates value LMs read: the largest top_k of the rows
            that a lookahead value steers; 0 if there are none.
    """

    rows: torch.Tensor | None
    values: tuple[Value, ...]
    users: tuple[torch.Tensor | None, ...]
    beta: torch.Tensor
    unused_slots: torch.Tensor | None
    tail: torch.Tensor | Literal["keep"]
    k: int
    dense: DenseSteering | None = None
    fused: FusedSteering | None = None
    kl_limit: KLLimit | None = None
    sibling_count: int = 0

    @classmethod
    def build(
        cls,
        values: Sequence[Value],
        beta: NDArray[np.float32],
        top_k: NDArray[np.int64],
        masked: NDArray[np.bool_],
        device: torch.device,
        rows: NDArray[np.int64] | None = None,
        min_p: NDArray[np.float32] | None = None,
        steerer: FusedSteerer | None = None,
        max_kl: NDArray[np.float32] | None = None,
        *,
        fuses_candidates: bool = True,
    ) -> SteeringBatch:
        """Build the record from host arrays without waiting for the device.

        Args:
            values: the M values.
            beta: [S, M] weights.
            top_k: [S] candidates of each row; 0 for a row that is not steered, DENSE for a row
                without a fixed number of them.
            masked: [S] True where the tail is masked.
            device: where the logits are.
            rows: [S] indices of the rows in the logits; None for all.
            min_p: [S] for the rows that are DENSE: see `DenseSteering.build`. None if every such
                row has all of its tokens valued.
            steerer: what the fused call keeps between steps; None to steer without it. With it, all
                values are heads, and logits are overwritten.
            max_kl: [S] limits of each step's divergence in nats, inf for none; None for no limits.
            fuses_candidates: False if the caller reads the candidates of rows that have a number of
                them, so that the fused call does not steer these rows.
        """
        kl_limit = KLLimit.build(max_kl, device, rows)
        limits = np.zeros(len(top_k), np.float32) if min_p is None else min_p
        fusable = top_k if fuses_candidates else np.where(top_k == DENSE, DENSE, 0)
        fused = None
        if steerer is not None:
            heads = [value for value in values if isinstance(value, HeadValue)]
            fused = FusedSteering.build(steerer, heads, beta, fusable, limits, masked, device, rows)
        if fused is not None:
            top_k = np.where(is_fused(fusable, limits), 0, top_k)
        dense = None
        if (top_k == DENSE).any():
            dense = DenseSteering.build(values, beta, limits, top_k == DENSE, masked, device, rows)
            top_k = np.where(top_k == DENSE, 0, top_k)
        if not top_k.any() and (fused is not None or dense is not None):
            return cls.without_candidates(dense, fused, kl_limit)
        k = int(top_k.max())
        same_k = bool(top_k.min() == k)
        slots = np.arange(k)[None]
        return cls(
            rows=None if rows is None else upload(rows, device),
            values=tuple(values),
            users=tuple(_users(column, device) for column in beta.T),
            beta=upload(beta, device),
            unused_slots=None if same_k else upload(slots >= top_k[:, None], device),
            tail=upload(masked, device) if masked.any() else "keep",
            k=k,
            dense=dense,
            fused=fused,
            kl_limit=kl_limit,
            sibling_count=_sibling_count(values, beta, top_k),
        )

    @classmethod
    def without_candidates(
        cls,
        dense: DenseSteering | None,
        fused: FusedSteering | None,
        kl_limit: KLLimit | None = None,
    ) -> SteeringBatch:
        """Return a batch of rows that are all in `dense` or in `fused`."""
        no_weights = torch.empty((0, 0))
        return cls(
            rows=None,
            values=(),
            users=(),
            beta=no_weights,
            unused_slots=None,
            tail="keep",
            k=0,
            dense=dense,
            fused=fused,
            kl_limit=kl_limit,
        )

    @classmethod
    def build_on_device(
        cls,
        values: Sequence[Value],
        beta: torch.Tensor,
        top_k: torch.Tensor,
        masked: torch.Tensor | None,
        k: int,
        min_p: torch.Tensor | None = None,
        *,
        has_all: bool = False,
        steerer: FusedSteerer | None = None,
        max_kl: torch.Tensor | None = None,
    ) -> SteeringBatch:
        """Build the record for all rows of the logits from tensors that the host has not read.

        Rows with a top_k of 0 have no candidates, so their logits stay the same.

        Args:
            values: the M values.
            beta: [B, M] weights.
            top_k: [B] candidates of each row; DENSE for a row without a fixed number of them.
            masked: [B] True where the tail is masked; None if no row masks it.
            k: an upper bound of `top_k`; 0 if every steered row is DENSE.
            min_p: [B] for the rows that are DENSE, 0 for all tokens; None if no row has its likely
                tokens valued.
            has_all: False only if no row has all of its tokens valued.
            steerer: as for `build`.
            max_kl: [B] limits, inf for none; None if no row has one.
        """
        kl_limit = None if max_kl is None else KLLimit(None, max_kl)
        is_dense = top_k == DENSE
        fused = None
        if steerer is not None and values and (k or min_p is not None):
            heads = [value for value in values if isinstance(value, HeadValue)]
            fused = FusedSteering.build_on_device(steerer, heads, beta, top_k, min_p, masked, k)
            top_k = torch.where(top_k > MAX_CANDIDATES, top_k, 0)
            if min_p is not None:
                is_dense &= min_p == 0
                min_p = None
        dense = None
        if has_all or min_p is not None:
            dense = DenseSteering.build_on_device(values, beta, min_p, is_dense, masked)
        if fused is not None and k <= MAX_CANDIDATES:
            return cls.without_candidates(dense, fused, kl_limit)
        slots = torch.arange(k, device=top_k.device)[None]
        return cls(
            rows=None,
            values=tuple(values),
            users=(None,) * len(values),
            beta=beta,
            unused_slots=slots >= top_k[:, None],
            tail="keep" if masked is None else masked,
            k=k,
            dense=dense,
            fused=fused,
            kl_limit=kl_limit,
        )

    def valid(self, candidates: torch.Tensor) -> torch.Tensor:
        """Return the candidates with -1 in slots past a row's own top_k. [S, k] -> [S, k]."""
        if self.unused_slots is None:
            return candidates
        return candidates.masked_fill(self.unused_slots, -1)


def _sibling_count(
    values: Sequence[Value], beta: NDArray[np.float32], top_k: NDArray[np.int64]
) -> int:
    lookaheads = [isinstance(value, LookaheadValue) for value in values]
    rows = beta[:, lookaheads].any(axis=1)
    return int(top_k[rows].max(initial=0))


def _users(column: NDArray[np.float32], device: torch.device) -> torch.Tensor | None:
    if column.all():
        return None
    return upload(np.flatnonzero(column), device)
