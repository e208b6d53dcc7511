"""Steering of likely tokens in Triton: those with a logit of at least the largest plus log_min_p.

A row has any number of likely tokens, and needs no order of them. So the peaks of the tiles, which
the first launch of steering has written, say which tiles hold one. Two more launches read these
tiles only: one adds up the shifts, and one adds the centred shifts to the logits.

A program reads one group of tiles of one row. The cost of a row grows with its likely tokens.
"""

# Triton compiles the kernels and reads their signatures.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from infer_align_kernels.steer_logits.types import HeadTable, SteeredRows
from infer_align_kernels.steer_logits.weighing import (
    COUNT,
    LIKELY,
    LOG_MIN_P,
    MASKED,
    RANK,
    ROW,
    WEIGHTS,
    strongest_weight,
    usable_shifts,
    weigh_values,
)
from infer_align_kernels.top_candidates.triton import NO_INDEX, NO_KEY, Cut, key_logits

# Tiles of one program.
GROUP = 64


@triton.jit
def smallest_likely(peaks, weights, s, record, N, TILES: tl.constexpr):
    """Return the smallest logit of a likely token of a row, from the peaks of its tiles."""
    tiles = tl.arange(0, TILES)
    keys = tl.load(peaks + s * N + tiles, mask=tiles < N, other=NO_KEY)
    return key_logits(tl.max(keys, axis=0)) + tl.load(weights + record + LOG_MIN_P)


@triton.jit
def likely_tiles(peaks, s, N, smallest, GROUP: tl.constexpr):
    """Return the indices of a group's tiles, and where these hold a likely token."""
    tiles = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    keys = tl.load(peaks + s * N + tiles, mask=tiles < N, other=NO_KEY)
    return tiles, (tiles < N) & (key_logits(keys) >= smallest)


@triton.jit
def read_tile(logits, tile, V, smallest, TILE: tl.constexpr):
    """Return the tokens of a tile, their logits, and which of these are likely. [TILE] each."""
    tokens = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
    x = tl.load(logits + tokens, mask=tokens < V, other=float("-inf"))
    # Only NaN differs from itself.
    x = tl.where(x != x, float("-inf"), x)  # noqa: PLR0124
    return tokens, x, (tokens < V) & (x >= smallest)


@triton.jit
def steer_likely_sums_kernel(
    logits,
    peaks,
    sums,
    features,
    addresses,
    ranks,
    rows,
    weights,
    V,
    N,
    M,
    D,
    row_stride,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
):
    """Write the sum of a group's shifts and their number. Grid: (groups, steered rows).

    `rows` and `weights` are the same memory, as int32 and as float32.
    """
    s = tl.program_id(1).to(tl.int64)
    record = s * (WEIGHTS + M)
    beta = weights + record + WEIGHTS
    if tl.load(rows + record + COUNT) == LIKELY:
        total = 0.0
        number = 0.0
        if strongest_weight(beta, M) > 0:
            source = logits + tl.load(rows + record + ROW).to(tl.int64) * row_stride
            smallest = smallest_likely(peaks, weights, s, record, N, TILES)
            tiles, remaining = likely_tiles(peaks, s, N, smallest, GROUP)
            for _ in range(tl.sum(remaining.to(tl.int32), axis=0)):
                tile = tl.min(tl.where(remaining, tiles, NO_INDEX), axis=0)
                remaining = remaining & (tiles != tile)
                tokens, _, is_likely = read_tile(source, tile, V, smallest, TILE)
                shift = weigh_values(
                    features + s * D, addresses, ranks, beta, tokens, is_likely, M, TILE, RANK
                )
                finite, usable = usable_shifts(shift, is_likely)
                total += tl.sum(finite, axis=0)
                number += tl.sum(usable.to(tl.float32), axis=0)
        place = sums + (s * tl.num_programs(0) + tl.program_id(0)) * 2
        tl.store(place, total)
        tl.store(place + 1, number)


@triton.jit
def mask_unlikely(target, V, smallest, TILE: tl.constexpr, GROUP: tl.constexpr):
    """Set the logits of a group's tokens that are not likely to -inf."""
    first = tl.program_id(0) * GROUP
    for tile in range(first, first + GROUP):
        tokens, _, is_likely = read_tile(target, tile, V, smallest, TILE)
        nothing = tl.full((TILE,), float("-inf"), dtype=tl.float32)
        tl.store(target + tokens, nothing, mask=(tokens < V) & (is_likely == 0))


@triton.jit
def steer_likely_kernel(
    logits,
    peaks,
    sums,
    features,
    addresses,
    ranks,
    rows,
    weights,
    V,
    N,
    M,
    D,
    row_stride,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    RANK: tl.constexpr,
):
    """Steer the likely tokens of a group of tiles. Grid: (groups, steered rows)."""
    s = tl.program_id(1).to(tl.int64)
    record = s * (WEIGHTS + M)
    beta = weights + record + WEIGHTS
    is_steered = tl.load(rows + record + COUNT) == LIKELY
    if is_steered & (strongest_weight(beta, M) > 0):
        target = logits + tl.load(rows + record + ROW).to(tl.int64) * row_stride
        smallest = smallest_likely(peaks, weights, s, record, N, TILES)
        groups = tl.arange(0, GROUPS)
        place = sums + (s * tl.num_programs(0) + groups) * 2
        in_row = groups < tl.num_programs(0)
        total = tl.sum(tl.load(place, mask=in_row, other=0.0), axis=0)
        number = tl.sum(tl.load(place + 1, mask=in_row, other=0.0), axis=0)
        mean = total / tl.maximum(number, 1.0)
        if tl.load(rows + record + MASKED) != 0:
            mask_unlikely(target, V, smallest, TILE, GROUP)
            # A steered logit may fall below the smallest likely one, so no thread may still mask.
            tl.debug_barrier()
        tiles, remaining = likely_tiles(peaks, s, N, smallest, GROUP)
        for _ in range(tl.sum(remaining.to(tl.int32), axis=0)):
            tile = tl.min(tl.where(remaining, tiles, NO_INDEX), axis=0)
            remaining = remaining & (tiles != tile)
            tokens, x, is_likely = read_tile(target, tile, V, smallest, TILE)
            shift = weigh_values(
                features + s * D, addresses, ranks, beta, tokens, is_likely, M, TILE, RANK
            )
            finite, usable = usable_shifts(shift, is_likely)
            steered = tl.where(usable, x + (finite - mean), float("-inf"))
            # All threads have read the tile before one of them writes to it.
            tl.debug_barrier()
            tl.store(target + tokens, steered, mask=is_likely)


def group_count(cut: Cut) -> int:
    """Return the groups of tiles of a row."""
    return int(triton.cdiv(cut.tiles, GROUP))


def warps(cut: Cut) -> int:
    """Return the warps of a program. With fewer of them, large tiles do not fit in registers."""
    return max(4, cut.tile // 16)


def steer_likely(
    logits: torch.Tensor,
    features: torch.Tensor,
    heads: HeadTable,
    rows: SteeredRows,
    peaks: torch.Tensor,
    sums: torch.Tensor,
    cut: Cut,
) -> None:
    """Launch the kernels for the rows that are LIKELY.

    Args:
        logits: [B, V] float32, overwritten.
        features: [S, d] float32, contiguous.
        heads: the M heads.
        rows: the steering of the S rows.
        peaks: [S, tiles] int32 of `write_tile_peaks`.
        sums: memory for [S, groups, 2] float32.
        cut: how the vocabulary is cut.
    """
    groups = group_count(cut)
    arguments = (
        logits,
        peaks,
        sums,
        features,
        heads.addresses,
        heads.ranks,
        rows.table,
        rows.numbers,
        logits.shape[1],
        cut.tiles,
        len(heads),
        features.shape[1],
        logits.stride(0),
    )
    constants = {"TILE": cut.tile, "TILES": cut.tile_slots, "GROUP": GROUP, "RANK": RANK}
    grid = (groups, len(features))
    steer_likely_sums_kernel[grid](*arguments, **constants, num_warps=warps(cut))
    slots = triton.next_power_of_2(groups)
    steer_likely_kernel[grid](*arguments, **constants, GROUPS=slots, num_warps=warps(cut))
