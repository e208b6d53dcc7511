"""Measure the exact top-k against torch.topk and, where it is installed, FlashInfer's top-k.

Both leave the order of equal logits open.

python benchmarks/kernels/bench_top_candidates.py
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.kernels.measure import (
    CUDA,
    DEVICE,
    SEED,
    Rows,
    measure_row,
    record_shapes,
)
from infer_align_kernels import top_candidates

VOCABULARY = 128_256
# The batch sizes of the targets come first.
CUDA_ROWS = (256, 1, 512, 32, 8, 128, 64)
CPU_ROWS = (1, 8, 32)
CANDIDATES = (20, 64)


def random_logits(rows: int) -> torch.Tensor:
    """Return float32 logits, as an engine has them. [B, V]."""
    generator = torch.Generator(DEVICE).manual_seed(SEED)
    return torch.randn(rows, VOCABULARY, generator=generator, device=DEVICE) * 3


def check_agreement(logits: torch.Tensor, k: int) -> None:
    """Exit if the candidates are not those of a stable sort."""
    expected = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    if not torch.equal(top_candidates(logits, k), expected):
        raise SystemExit("top_candidates: differs from a stable sort. Nothing is measured.")


def flashinfer_top_k() -> Callable[..., Any] | None:
    """Return FlashInfer's top-k; None without a GPU, or where it is not installed."""
    if not CUDA or find_spec("flashinfer") is None:
        return None
    function: Callable[..., Any] | None = getattr(import_module("flashinfer"), "top_k", None)
    return function


def measure_shape(rows: int, k: int, bandwidth: float) -> Rows:
    """Measure one batch size and return its row, as the only one."""
    logits = random_logits(rows)
    check_agreement(logits, k)
    half = logits.bfloat16()
    variants = {
        "ours": lambda: top_candidates(logits, k),
        "topk": lambda: logits.topk(k),
        "ours_bf16": lambda: top_candidates(half, k),
        "topk_bf16": lambda: half.topk(k),
    }
    flashinfer = flashinfer_top_k()
    if flashinfer is not None:
        variants["flashinfer"] = lambda: flashinfer(logits, k, sorted=True)
        variants["flashinfer_bf16"] = lambda: flashinfer(half, k, sorted=True)
    shape = {"B": rows, "V": VOCABULARY, "k": k}
    return [measure_row(shape, variants, logits.nbytes, bandwidth)]


def main() -> None:
    """Measure all shapes and write the results."""
    record_shapes(
        "top_candidates",
        "topk: torch.topk of the same logits; flashinfer: its top_k, sorted, where installed",
        [(rows, k) for k in CANDIDATES for rows in (CUDA_ROWS if CUDA else CPU_ROWS)],
        measure_shape,
    )


if __name__ == "__main__":
    main()
