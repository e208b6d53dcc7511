"""Steering by heads in Triton, in two launches.

The first is that of `top_candidates`: it reads the logits once and writes the peak of each tile.
The second has one program per steered row, which selects the candidates, values them with every
head, centres the weighted values and adds them to the logits. Rows that have their likely tokens
valued take two launches of their own (`likely.py`).
"""

# Triton compiles the kernel and reads its signature.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from infer_align_kernels.steer_logits import likely
from infer_align_kernels.steer_logits.types import HeadTable, SteeredRows, Workspace
from infer_align_kernels.steer_logits.weighing import (
    COUNT,
    MASKED,
    RANK,
    ROW,
    WEIGHTS,
    strongest_weight,
    usable_shifts,
    weigh_values,
)
from infer_align_kernels.top_candidates.triton import Cut, plan, select_candidates, write_tile_peaks

# Tokens that are masked at once.
FILL = 4096


@triton.jit
def steer_logits_kernel(
    logits,
    peaks,
    features,
    addresses,
    ranks,
    rows,
    weights,
    out,
    V,
    N,
    M,
    K,
    D,
    row_stride,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    RANK: tl.constexpr,
    FILL: tl.constexpr,
):
    """Steer one row and write its candidates. Grid: (steered rows,).

    `rows` and `weights` are the same memory, as int32 and as float32.
    """
    s = tl.program_id(0).to(tl.int64)
    record = s * (WEIGHTS + M)
    count = tl.load(rows + record + COUNT)
    row = tl.load(rows + record + ROW).to(tl.int64)
    beta = weights + record + WEIGHTS
    ids, frozen = select_candidates(
        logits, peaks, s, row, V, N, row_stride, count, SLOTS, TILE, TILES
    )
    slots = tl.arange(0, SLOTS)
    tl.store(out + s * K + slots, ids.to(tl.int64), mask=slots < K)
    if (strongest_weight(beta, M) > 0) & (count > 0):
        is_candidate = ids >= 0
        tokens = tl.maximum(ids, 0).to(tl.int64)
        shift = weigh_values(
            features + s * D, addresses, ranks, beta, tokens, is_candidate, M, SLOTS, RANK
        )
        finite, usable = usable_shifts(shift, is_candidate)
        number = tl.maximum(tl.sum(usable.to(tl.float32), axis=0), 1.0)
        steered = frozen + (finite - tl.sum(finite, axis=0) / number)
        steered = tl.where(usable, steered, float("-inf"))
        target = logits + row * row_stride
        if tl.load(rows + record + MASKED) != 0:
            for start in range(0, V, FILL):
                masked = start + tl.arange(0, FILL)
                nothing = tl.full((FILL,), float("-inf"), dtype=tl.float32)
                tl.store(target + masked, nothing, mask=masked < V)
            # The candidates are written after all threads have masked their tokens.
            tl.debug_barrier()
        tl.store(target + tokens, steered, mask=is_candidate)


def steer_logits(
    logits: torch.Tensor,
    features: torch.Tensor,
    heads: HeadTable,
    rows: SteeredRows,
    workspace: Workspace,
) -> torch.Tensor:
    """Launch the kernels; see `infer_align_kernels.steer_logits`."""
    steered = len(features)
    out = torch.empty((steered, rows.k), dtype=torch.int64, device=logits.device)
    if steered == 0:
        return out
    features = features.contiguous()
    cut = plan(logits.shape[1], max(rows.k, 1))
    if rows.has_likely:
        # The peaks of all rows, then two sums of each group of tiles.
        groups = likely.group_count(cut)
        memory = workspace.take(steered, cut.tiles + 2 * groups, logits.device).flatten()
        peaks = memory[: steered * cut.tiles].view(steered, cut.tiles)
        sums = memory[steered * cut.tiles :].view(torch.float32)
    else:
        peaks = workspace.take(steered, cut.tiles, logits.device)
    write_tile_peaks(logits, rows.table, peaks, cut)
    if rows.k:
        _steer_candidates(logits, features, heads, rows, peaks, out, cut)
    if rows.has_likely:
        likely.steer_likely(logits, features, heads, rows, peaks, sums, cut)
    return out


def _steer_candidates(
    logits: torch.Tensor,
    features: torch.Tensor,
    heads: HeadTable,
    rows: SteeredRows,
    peaks: torch.Tensor,
    out: torch.Tensor,
    cut: Cut,
) -> None:
    """Launch the kernel for the rows with a number of candidates."""
    steer_logits_kernel[(len(features),)](
        logits,
        peaks,
        features,
        heads.addresses,
        heads.ranks,
        rows.table,
        rows.numbers,
        out,
        logits.shape[1],
        cut.tiles,
        len(heads),
        rows.k,
        features.shape[1],
        logits.stride(0),
        SLOTS=cut.slots,
        TILE=cut.tile,
        TILES=cut.tile_slots,
        RANK=RANK,
        FILL=FILL,
        num_warps=cut.num_warps,
    )
