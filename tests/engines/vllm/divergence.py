"""The divergence of a steered step and its limit, in float64."""

from __future__ import annotations

import torch


def divergence(frozen: torch.Tensor, steered: torch.Tensor) -> float:
    """Return KL(steered || frozen) of two rows of logits, in nats."""
    log_p = frozen.double().log_softmax(-1)
    log_q = steered.double().log_softmax(-1)
    return float((log_q.exp() * (log_q - log_p)).sum())


def limited(frozen: torch.Tensor, steered: torch.Tensor, max_kl: float) -> torch.Tensor:
    """Return logits with the largest part of the steering whose divergence is within the limit."""
    shift = steered.double() - frozen.double()
    part = 0.0
    for share in (0.5**n for n in range(50)):
        if divergence(frozen, frozen.double() + (part + share) * shift) <= max_kl:
            part += share
        if part == 1.0:
            break
    return (frozen.double() + part * shift).float()
