"""Top-k: the candidates of a row, exactly, with ties to the lowest id.

Shapes: B rows, V vocabulary, k candidates.
"""

from __future__ import annotations

import torch

from infer_align_kernels.devices import launching, runs_triton
from infer_align_kernels.top_candidates import reference

# The most candidates that the Triton kernel selects: it keeps their tiles in registers.
MAX_CANDIDATES = 128


def top_candidates(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Return the ids of the k largest logits of each row, largest first, equal ones by lower id.

    `torch.topk` leaves the order of equal logits open. NaN counts as -inf. On a GPU, the call does
    not wait for the device, and a row's result does not depend on the other rows.

    Args:
        logits: [B, V].
        k: 1..V.

    Returns:
        [B, k] int64.

    Raises:
        ValueError: k is outside 1..V.
    """
    if logits.ndim != 2 or not 1 <= k <= logits.shape[1]:
        raise ValueError(
            f"k: {k} is not allowed for logits {tuple(logits.shape)}; must be in 1..V of [B, V]."
        )
    if not runs_triton(logits.device):
        return reference.top_candidates(logits, k)
    if k > MAX_CANDIDATES:
        return reference.top_candidates_by_key(logits, k)
    # Triton is not needed on a CPU.
    from infer_align_kernels.top_candidates import triton  # noqa: PLC0415

    with launching(logits.device):
        return triton.top_candidates(logits, k)
