"""Steer logits by heads in one call: select, value, centre and add.

Shapes: B rows of logits, S steered rows, V vocabulary, M heads, k candidates, d features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from infer_align_kernels.devices import launching, runs_triton
from infer_align_kernels.steer_logits import reference
from infer_align_kernels.steer_logits.types import HeadTable, SteeredRows, Workspace

if TYPE_CHECKING:
    from infer_align_kernels.steer_logits.layers import CompiledLayers

__all__ = [
    "HeadTable",
    "SteeredRows",
    "Workspace",
    "compiled_layers",
    "steer_logits",
    "steers_at_once",
]

log = logging.getLogger(__name__)


def steers_at_once(device: torch.device) -> bool:
    """Return True if `steer_logits` is compiled for this device, so that it replaces other calls.

    That is a GPU, and a CPU on which Numba is installed. On a CPU, the first use compiles it.
    """
    return runs_triton(device) or (device.type == "cpu" and _on_cpu() is not reference.steer_logits)


def compiled_layers(heads: Sequence[Mapping[str, torch.Tensor]]) -> CompiledLayers | None:
    """Return the layers of heads, compiled for a CPU.

    Args:
        heads: the layers of each head: P, or W1, c1 and W2; float32 on a CPU.

    Returns:
        The layers; None if torch computes them: without Numba, or if a head has large layers.
    """
    if _on_cpu() is reference.steer_logits:
        return None
    from infer_align_kernels.steer_logits import layers  # noqa: PLC0415

    return layers.CompiledLayers(heads) if layers.are_small(heads) else None


@cache
def _on_cpu() -> Callable[..., torch.Tensor]:
    """Return the implementation for a CPU: that of Numba, or the reference without Numba."""
    if find_spec("numba") is None:
        return reference.steer_logits
    try:
        from infer_align_kernels.steer_logits import numba  # noqa: PLC0415
    except ImportError as error:
        log.warning("steering on this CPU is not compiled: Numba cannot be imported: %s", error)
        return reference.steer_logits
    return numba.steer_logits


def steer_logits(
    logits: torch.Tensor,
    features: torch.Tensor,
    heads: HeadTable,
    rows: SteeredRows,
    workspace: Workspace,
) -> torch.Tensor:
    """Add beta times the centred values of each row's candidates to their logits, in place.

    The value of a token by head m is features_m . weight_m[token] + bias_m[token]. The shift of a
    candidate is the weighted sum of its values, minus the mean of that sum over the candidates.
    Candidates are the largest logits, equal ones by lower id, or all likely tokens, whose logit is
    at least the largest one plus log_min_p. NaN counts as -inf.

    A row without candidates, or whose weights are all 0, stays bit for bit the same. A head whose
    weight is 0 is ignored. A candidate whose weighted sum is not finite gets -inf and does not
    count in the mean. On a GPU, nothing waits for the device. The call takes two launches, and two
    more if a row has its likely tokens valued.

    Args:
        logits: [B, V] float32, overwritten. Rows may be strided, tokens are contiguous.
        features: [S, d] float32, contiguous; d is the sum of the heads' ranks.
        heads: the M heads.
        rows: the steering of the S rows, all different.
        workspace: memory for the call.

    Returns:
        [S, k] int64 candidates; -1 in slots past a row's own number. Likely tokens are not listed.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    _check(logits, features, heads, rows)
    if not runs_triton(logits.device):
        steer = _on_cpu() if logits.is_cpu else reference.steer_logits
        return steer(logits, features, heads, rows)
    # Triton is not needed on a CPU.
    from infer_align_kernels.steer_logits import triton  # noqa: PLC0415

    with launching(logits.device):
        return triton.steer_logits(logits, features, heads, rows, workspace)


def _check(
    logits: torch.Tensor, features: torch.Tensor, heads: HeadTable, rows: SteeredRows
) -> None:
    if logits.ndim != 2 or logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(
            f"logits: {tuple(logits.shape)} {logits.dtype} is not allowed; must be [B, V] "
            "torch.float32 with contiguous tokens."
        )
    if heads.weights[0].shape[0] != logits.shape[1]:
        raise ValueError(
            f"heads: {heads.weights[0].shape[0]} tokens are not allowed; must be "
            f"{logits.shape[1]}, as logits."
        )
    expected = (len(rows.table), heads.features)
    if tuple(features.shape) != expected or features.dtype != torch.float32:
        raise ValueError(
            f"features: {tuple(features.shape)} {features.dtype} is not allowed; must be "
            f"{expected} torch.float32."
        )
    if rows.table.shape[1] != SteeredRows.COLUMNS + len(heads):
        raise ValueError(
            f"rows: {rows.table.shape[1]} columns are not allowed; must be "
            f"{SteeredRows.COLUMNS + len(heads)} for {len(heads)} heads."
        )
    if rows.k > logits.shape[1]:
        raise ValueError(f"rows: k {rows.k} is not allowed; must be at most {logits.shape[1]}.")
