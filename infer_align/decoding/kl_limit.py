"""A limit on the Kullback-Leibler divergence of each steered step from the frozen model.

With p the frozen model's next-token distribution at temperature 1 and s the shift that steering
adds to its logits, the steered distribution is q_t = softmax(log p + t s) at t = 1. The divergence
KL(q_t || p) = t E_q[s] - log E_p[exp(t s)] grows with t, so bisection finds the largest t in 0..1
that keeps it at or under the limit. A step that is under the limit keeps its logits bit for bit.

This is the same as a smaller beta at this step, for all values of the row alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from infer_align.decoding.device import upload

# Halvings of the interval of t. The smaller end is used, so that the limit always holds.
HALVINGS = 20


@dataclass(frozen=True, slots=True, eq=False)
class KLLimit:
    """The limits of L rows.

    Attributes:
        rows: [L] indices of the rows in the logits; None for all rows.
        max_kl: [L] the largest divergence of a step, in nats; inf for a row without a limit.
    """

    rows: torch.Tensor | None
    max_kl: torch.Tensor

    @classmethod
    def build(
        cls,
        max_kl: NDArray[np.float32] | None,
        device: torch.device,
        rows: NDArray[np.int64] | None,
    ) -> KLLimit | None:
        """Build the record from host arrays; None if no row has a limit.

        Args:
            max_kl: [S] limits of the steered rows; inf for a row without one.
            device: where the logits are.
            rows: [S] indices of the rows in the logits; None for all.
        """
        if max_kl is None or not np.isfinite(max_kl).any():
            return None
        limited = np.flatnonzero(np.isfinite(max_kl))
        if rows is None and len(limited) == len(max_kl):
            return cls(None, upload(max_kl, device))
        indices = limited if rows is None else rows[limited]
        return cls(upload(indices, device), upload(max_kl[limited], device))

    def frozen(self, logits: torch.Tensor) -> torch.Tensor:
        """Return a copy of the logits of the limited rows: [B, V] -> [L, V]."""
        return logits.clone() if self.rows is None else logits.index_select(0, self.rows)

    def apply(self, frozen: torch.Tensor, steered: torch.Tensor) -> torch.Tensor:
        """Shrink the shift of the steps that are over the limit.

        Args:
            frozen: [L, V] logits of the limited rows before steering.
            steered: [B, V] logits after it, overwritten in the limited rows.

        Returns:
            `steered`.
        """
        rows = self.rows
        if rows is None:
            return steered.copy_(limit_kl(frozen, steered, self.max_kl))
        limited = limit_kl(frozen, steered.index_select(0, rows), self.max_kl)
        return steered.index_copy_(0, rows, limited)


def limit_kl(frozen: torch.Tensor, steered: torch.Tensor, max_kl: torch.Tensor) -> torch.Tensor:
    """Return steered logits whose divergence from the frozen ones is within the limit.

    A token whose steered logit is -inf is removed: it keeps -inf, and the divergence is that of the
    other tokens. A value that is not finite removes its token in this way.

    Args:
        frozen: [L, V] logits; -inf stays -inf.
        steered: [L, V] logits after steering.
        max_kl: [L] limits in nats; inf keeps a row as it is.

    Returns:
        [L, V]. Rows that are within their limit stay bit for bit the same.
    """
    frozen = frozen.masked_fill(steered == -torch.inf, -torch.inf)
    shift = torch.where(frozen == -torch.inf, 0.0, steered - frozen)
    log_p = frozen.log_softmax(dim=-1)
    # t is between `low`, which keeps the limit, and `high`, which exceeds it: t = 0 is the frozen
    # model, whose divergence is 0. Rows that are within the limit at t = 1 ignore the result.
    low = torch.zeros_like(max_kl)
    high = torch.ones_like(max_kl)
    has_no_limit = max_kl == torch.inf
    is_within = has_no_limit | (_divergence(log_p, shift, high) <= max_kl)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = _divergence(log_p, shift, middle) <= max_kl
        low = torch.where(fits, middle, low)
        high = torch.where(fits, high, middle)
    return torch.where(is_within[:, None], steered, frozen + low[:, None] * shift)


def _divergence(log_p: torch.Tensor, shift: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return KL(q_t || p) of each row in nats: [L, V], [L, V], [L] -> [L].

    The formula is that of the module, with log E_p[exp(t s)] as the logsumexp of log p + t s.
    """
    weighted = t[:, None] * shift
    steered = log_p + weighted
    log_partition = steered.logsumexp(dim=-1)
    q = (steered - log_partition[:, None]).exp()
    return (q * weighted).sum(dim=-1) - log_partition
