"""Steering by heads in torch: the definition of the kernel, row by row."""

from __future__ import annotations

import torch

from infer_align_kernels.steer_logits.types import HeadTable, SteeredRows
from infer_align_kernels.top_candidates import reference as top_candidates


def steer_logits(
    logits: torch.Tensor, features: torch.Tensor, heads: HeadTable, rows: SteeredRows
) -> torch.Tensor:
    """Steer each row; see `infer_align_kernels.steer_logits`."""
    candidates = torch.full((len(features), rows.k), -1, dtype=torch.int64, device=logits.device)
    beta = rows.beta.tolist()
    for s, (row, count, masked) in enumerate(rows.table[:, :3].tolist()):
        if count == rows.LIKELY:
            ids = _likely_tokens(logits[row], rows.log_min_p[s])
        elif count:
            ids = top_candidates.top_candidates(logits[row : row + 1], count)[0]
            candidates[s, :count] = ids
        if count and any(beta[s]):
            _steer_row(logits[row], ids, features[s], heads, beta[s], masked=bool(masked))
    return candidates


def _likely_tokens(logits: torch.Tensor, log_min_p: torch.Tensor) -> torch.Tensor:
    """Return the ids of the tokens that are likely enough. [V], [] -> [number of them]."""
    clean = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return (clean >= clean.max() + log_min_p).nonzero()[:, 0]


def _steer_row(
    logits: torch.Tensor,
    ids: torch.Tensor,
    features: torch.Tensor,
    heads: HeadTable,
    beta: list[float],
    *,
    masked: bool,
) -> None:
    """Steer one row in place. [V], [k], [d]."""
    shift = torch.zeros(len(ids), device=logits.device)
    place = 0
    for weight, bias, strength in zip(heads.weights, heads.biases, beta, strict=True):
        rank = weight.shape[1]
        if strength:
            value = weight[ids] @ features[place : place + rank] + bias[ids]
            shift += strength * value
        place += rank
    usable = shift.isfinite()
    steered = logits[ids].nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    steered = steered + shift - shift[usable].mean()
    if masked:
        logits.fill_(-torch.inf)
    logits[ids] = steered.masked_fill(~usable, -torch.inf)
