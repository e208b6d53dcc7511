"""Value steering of rows without a fixed number of candidates.

Such a row has all of its tokens valued, exactly, or all that are at least `min_p` times as likely
as the likeliest one. Only heads can do that: they value every token with one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from infer_align.decoding.device import upload
from infer_align.steering import Steering
from infer_align.values import Value
from infer_align.values.head import HeadValue

# In an array of top_k: the row has no fixed number of candidates.
DENSE = -1


def candidate_count(steering: Steering, vocabulary: int) -> int:
    """Return the number of candidates of a row, or DENSE if it has no fixed number."""
    if steering.candidates is None:
        return DENSE
    return min(steering.candidates, vocabulary)


@dataclass(frozen=True, slots=True, eq=False)
class DenseSteering:
    """Steering of D rows by M heads.

    Attributes:
        rows: [D] indices of these rows in the logits; None for all rows.
        heads: the M values.
        beta: [D, M] weights; a row of zeros stays bit for bit the same.
        log_min_p: [D] the smallest logprob that is valued, relative to the likeliest token; -inf
            for all tokens. None if every row has all tokens valued.
        masked: [D] True where the tokens that are not valued are masked; None if no row masks them.
    """

    rows: torch.Tensor | None
    heads: tuple[HeadValue, ...]
    beta: torch.Tensor
    log_min_p: torch.Tensor | None
    masked: torch.Tensor | None

    @classmethod
    def build(
        cls,
        values: Sequence[Value],
        beta: NDArray[np.float32],
        min_p: NDArray[np.float32],
        is_dense: NDArray[np.bool_],
        masked: NDArray[np.bool_],
        device: torch.device,
        rows: NDArray[np.int64] | None,
    ) -> DenseSteering:
        """Build the record from host arrays of all S steered rows, without waiting for the device.

        Args:
            values: the M values of the batch; those that steer a dense row are heads.
            beta: [S, M] weights.
            min_p: [S]; 0 for all tokens.
            is_dense: [S] True for the rows of this record.
            masked: [S] True where the other tokens are masked.
            device: where the logits are.
            rows: [S] indices of the rows in the logits; None for all.
        """
        dense_rows = np.flatnonzero(is_dense)
        columns = np.flatnonzero(beta[dense_rows].any(axis=0))
        limits = min_p[dense_rows]
        masks = masked[dense_rows] & (limits > 0)
        with np.errstate(divide="ignore"):
            log_min_p = np.log(limits)
        indices = dense_rows if rows is None else rows[dense_rows]
        is_everything = rows is None and bool(is_dense.all())
        return cls(
            rows=None if is_everything else upload(indices, device),
            heads=_heads([values[column] for column in columns.tolist()]),
            beta=upload(beta[np.ix_(dense_rows, columns)], device),
            log_min_p=upload(log_min_p, device) if limits.any() else None,
            masked=upload(masks, device) if masks.any() else None,
        )

    @classmethod
    def build_on_device(
        cls,
        values: Sequence[Value],
        beta: torch.Tensor,
        min_p: torch.Tensor | None,
        is_dense: torch.Tensor,
        masked: torch.Tensor | None,
    ) -> DenseSteering:
        """Build the record for all rows of the logits from tensors that the host has not read.

        Args:
            values: the M heads.
            beta: [B, M] weights.
            min_p: [B]; 0 for all tokens. None if every row has all of its tokens valued.
            is_dense: [B] False for the rows that stay the same.
            masked: [B] True where the other tokens are masked; None if no row masks them.
        """
        log_min_p = None
        if min_p is None:
            masked = None
        else:
            log_min_p = min_p.log()
            masked = None if masked is None else masked & (min_p > 0)
        weights = beta * is_dense[:, None]
        return cls(None, _heads(values), weights, log_min_p, masked)


def _heads(values: Sequence[Value]) -> tuple[HeadValue, ...]:
    """Return the values, which `check_values` has restricted to heads."""
    return tuple(value for value in values if isinstance(value, HeadValue))


def add_dense(logits: torch.Tensor, hidden: torch.Tensor, dense: DenseSteering) -> torch.Tensor:
    """Add the weighted values of all valued tokens to their logits, in place.

    Args:
        logits: [B, V] float32, overwritten in the rows of the record.
        hidden: [B, d] states that the output layer read.
        dense: the steering.

    Returns:
        `logits`.
    """
    rows = dense.rows
    states = hidden if rows is None else hidden.index_select(0, rows)
    states = states.float()
    if dense.log_min_p is None:
        for m, head in enumerate(dense.heads):
            head.add_all(logits, states, dense.beta[:, m], rows)
        return logits
    frozen = logits if rows is None else logits.index_select(0, rows)
    steered = _add_to_likely(frozen, states, dense, dense.log_min_p)
    if rows is None:
        return logits.copy_(steered)
    return logits.index_copy_(0, rows, steered)


def _add_to_likely(
    logits: torch.Tensor, states: torch.Tensor, dense: DenseSteering, log_min_p: torch.Tensor
) -> torch.Tensor:
    """Return the logits with values added to the likely tokens, centred over them. [D, V].

    A token is likely if p >= min_p * p_max, which is logit >= max logit + log min_p.
    """
    shift = torch.zeros_like(logits)
    for m, head in enumerate(dense.heads):
        shift += dense.beta[:, m, None] * head.evaluate_all(states)
    lowest = logits.amax(dim=-1, keepdim=True) + log_min_p[:, None]
    valued = logits >= lowest
    count = valued.sum(dim=-1, keepdim=True).clamp(min=1)
    total = torch.where(valued, shift, 0.0).sum(dim=-1, keepdim=True)
    mean = total / count
    tail = logits
    if dense.masked is not None:
        tail = torch.where(dense.masked[:, None], -torch.inf, logits)
    steered = torch.where(valued, logits + (shift - mean), tail)
    is_steered = (dense.beta != 0).any(dim=1, keepdim=True)
    return torch.where(is_steered, steered, logits)
