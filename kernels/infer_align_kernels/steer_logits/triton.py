"""Steering by heads in Triton, in two launches.

The first is that of `top_candidates`: it reads the logits once and writes the peak of each tile.
The second has one program per steered row, which selects the candidates, values them with every
head, centres the weighted values and adds them to the logits.
"""

# Triton compiles the kernel and reads its signature.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from infer_align_kernels.steer_logits.types import HeadTable, SteeredRows, Workspace
from infer_align_kernels.top_candidates.triton import plan, select_candidates, write_tile_peaks

LARGEST = tl.constexpr(3.4028234663852886e38)
# The columns of a row's record, before its weights.
ROW = tl.constexpr(0)
COUNT = tl.constexpr(1)
MASKED = tl.constexpr(2)
WEIGHTS = tl.constexpr(3)
# Features per step of a value.
RANK = 16
# Tokens that are masked at once.
FILL = 4096


@triton.jit
def weigh_values(
    features,
    addresses,
    ranks,
    beta,
    tokens,
    is_candidate,
    M,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
):
    """Return the sum over m of beta_m times the value of each candidate. [SLOTS]."""
    total = tl.zeros((SLOTS,), dtype=tl.float32)
    for m in range(M):
        strength = tl.load(beta + m)
        # A head of weight 0 is not read, so it may hold NaN.
        if strength != 0:
            weight = tl.load(addresses + m).to(tl.pointer_type(tl.float32))
            bias = tl.load(addresses + M + m).to(tl.pointer_type(tl.float32))
            rank = tl.load(ranks + m)
            first_feature = tl.load(ranks + M + m)
            value = tl.load(bias + tokens, mask=is_candidate, other=0.0)
            for start in range(0, rank, RANK):
                places = start + tl.arange(0, RANK)
                in_rank = places < rank
                e = tl.load(
                    weight + tokens[:, None] * rank + places[None, :],
                    mask=is_candidate[:, None] & in_rank[None, :],
                    other=0.0,
                )
                u = tl.load(features + first_feature + places, mask=in_rank, other=0.0)
                value += tl.sum(e * u[None, :], axis=1)
            total += strength * value
    return total


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
    strongest = 0.0
    for m in range(M):
        strongest = tl.maximum(strongest, tl.abs(tl.load(beta + m)))
    if (strongest > 0) & (count > 0):
        is_candidate = ids >= 0
        tokens = tl.maximum(ids, 0).to(tl.int64)
        shift = weigh_values(
            features + s * D, addresses, ranks, beta, tokens, is_candidate, M, SLOTS, RANK
        )
        # The comparison is False for NaN.
        usable = is_candidate & (tl.abs(shift) <= LARGEST)
        finite = tl.where(usable, shift, 0.0)
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
    vocabulary = logits.shape[1]
    cut = plan(vocabulary, rows.k)
    peaks = workspace.take(steered, cut.tiles, logits.device)
    write_tile_peaks(logits, rows.table, peaks, cut)
    steer_logits_kernel[(steered,)](
        logits,
        peaks,
        features.contiguous(),
        heads.addresses,
        heads.ranks,
        rows.table,
        rows.table.view(torch.float32),
        out,
        vocabulary,
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
    return out
