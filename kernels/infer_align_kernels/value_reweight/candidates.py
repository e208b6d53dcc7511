"""Kernels for k candidates per row: their values, their shifts, and the steered logits."""

# Triton compiles these functions and reads their signatures.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from infer_align_kernels.value_reweight.sampling import (
    LARGEST,
    STATISTICS,
    choose_tile,
    clean_logits,
    draw_token,
    finite_peak,
    load_frozen_logits,
    log2_scale,
)

# Values of the compile-time argument TAIL. With PER_ROW, `masked` holds a flag per row.
KEEP = tl.constexpr(0)
MASK = tl.constexpr(1)
PER_ROW = tl.constexpr(2)
# Candidates that are looked for in a tile at once.
GROUP = tl.constexpr(32)


@triton.jit
def is_steered(beta, row, ids, M, K):
    """Return True if a row has a non-zero beta and a candidate."""
    strongest = 0.0
    for m in range(M):
        strongest = tl.maximum(strongest, tl.abs(tl.load(beta + row * M + m).to(tl.float32)))
    return (strongest > 0) & (tl.load(ids + row * K) >= 0)


@triton.jit
def steer_tile(
    frozen,
    ids,
    shifts,
    beta,
    masked,
    row,
    M,
    K,
    start,
    tokens,
    TOKENS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Add the shifts of the candidates in one tile of a row, and apply the tail.

    Returns the steered logits, and True if they may differ from the frozen ones.
    """
    x = frozen
    changed = False
    if is_steered(beta, row, ids, M, K):
        # Not a conditional expression: the branch is chosen when the kernel is compiled.
        if TAIL == PER_ROW:
            changed = tl.load(masked + row) != 0
        else:
            changed = TAIL == MASK
        x = tl.where(changed, float("-inf"), x)
        for first in range(0, K, GROUP):
            slots = first + tl.arange(0, GROUP)
            group = tl.load(ids + row * K + slots, mask=slots < K, other=-1)
            in_tile = (group >= start) & (group < start + TOKENS)
            # Few of the tiles hold a candidate. The others need no look at each of them.
            if tl.max(in_tile.to(tl.int32), axis=0) > 0:
                for j in range(first, tl.minimum(first + GROUP, K)):
                    candidate = tl.load(ids + row * K + j)
                    if (candidate >= start) & (candidate < start + TOKENS):
                        shift = tl.load(shifts + row * K + j)
                        x = tl.where(tokens == candidate, frozen + shift, x)
                        changed = True
    return x, changed


@triton.jit
def value_reweight_shift_kernel(
    logits,
    ids,
    values,
    beta,
    shifts,
    out,
    B,
    M,
    K,
    row_stride,
    out_stride,
    SLOTS: tl.constexpr,
    SCATTER: tl.constexpr,
):
    """Compute sum over m of beta_m (v_m - mean of v_m) for the slots of one row. Grid: (rows,).

    Without SCATTER, the shifts are stored in `shifts`. With SCATTER, the logits of the candidates
    plus their shifts are stored in `out`.
    """
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, SLOTS)
    in_row = slots < K
    candidates = tl.load(ids + row * K + slots, mask=in_row, other=-1)
    usable = candidates >= 0
    for m in range(M):
        strength = tl.load(beta + row * M + m).to(tl.float32)
        value = tl.load(values + (row + m * B) * K + slots, mask=in_row, other=0.0).to(tl.float32)
        usable = usable & (tl.where(strength != 0, tl.abs(value), 0.0) <= LARGEST)
    count = tl.maximum(tl.sum(usable.to(tl.float32), axis=0), 1.0)
    shift = tl.zeros((SLOTS,), dtype=tl.float32)
    for m in range(M):
        strength = tl.load(beta + row * M + m).to(tl.float32)
        value = tl.load(values + (row + m * B) * K + slots, mask=in_row, other=0.0).to(tl.float32)
        value = tl.where(usable, tl.where(strength != 0, value, 0.0), 0.0)
        shift += strength * (value - tl.sum(value, axis=0) / count)
    shift = tl.where(usable, shift, float("-inf"))
    if SCATTER:
        is_target = tl.where(is_steered(beta, row, ids, M, K), candidates, -1) >= 0
        pointers = logits + row * row_stride + candidates
        logit = tl.load(pointers, mask=is_target, other=0.0).to(tl.float32)
        tl.store(out + row * out_stride + candidates, logit + shift, mask=is_target)
    else:
        tl.store(shifts + row * K + slots, shift, mask=in_row)


@triton.jit
def value_reweight_apply_kernel(
    logits,
    ids,
    shifts,
    beta,
    masked,
    out,
    V,
    M,
    K,
    row_stride,
    out_stride,
    TOKENS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Write the steered logits of one tile of tokens of one row. Grid: (tiles, rows)."""
    row = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * TOKENS
    tokens = start + tl.arange(0, TOKENS)
    in_row = tokens < V
    frozen = tl.load(logits + row * row_stride + tokens, mask=in_row, other=0.0).to(tl.float32)
    x, _ = steer_tile(frozen, ids, shifts, beta, masked, row, M, K, start, tokens, TOKENS, TAIL)
    tl.store(out + row * out_stride + tokens, x, mask=in_row)


@triton.jit
def value_reweight_candidates_tile_kernel(
    logits,
    ids,
    shifts,
    beta,
    masked,
    temperature,
    statistics,
    B,
    V,
    M,
    K,
    row_stride,
    TOKENS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Write the statistics of one tile of tokens of one row. Grid: (tiles, rows)."""
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    start = tile * TOKENS
    tokens = start + tl.arange(0, TOKENS)
    frozen = load_frozen_logits(logits, row, row_stride, tokens, tokens < V)
    scale = log2_scale(tl.load(temperature + row).to(tl.float32))
    frozen_peak = tl.max(frozen, axis=0)
    frozen_total = tl.sum(tl.exp2((frozen - finite_peak(frozen_peak)) * scale), axis=0)
    peak = frozen_peak
    total = frozen_total
    x, changed = steer_tile(
        frozen, ids, shifts, beta, masked, row, M, K, start, tokens, TOKENS, TAIL
    )
    if changed:
        x = clean_logits(x)
        peak = tl.max(x, axis=0)
        total = tl.sum(tl.exp2((x - finite_peak(peak)) * scale), axis=0)
    pointers = statistics + tile.to(tl.int64) * STATISTICS * B + row
    tl.store(pointers, peak)
    tl.store(pointers + B, total)
    tl.store(pointers + 2 * B, frozen_peak)
    tl.store(pointers + 3 * B, frozen_total)


@triton.jit
def value_reweight_candidates_pick_kernel(
    logits,
    ids,
    shifts,
    beta,
    masked,
    temperature,
    uniform,
    statistics,
    token_out,
    out,
    B,
    V,
    M,
    K,
    T,
    row_stride,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Choose a tile of one row and draw the token in it. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    row_temperature = tl.load(temperature + row).to(tl.float32)
    scale = log2_scale(row_temperature)
    greedy = row_temperature <= 0
    tile, target, peak, total, frozen_peak, frozen_total = choose_tile(
        statistics, row, B, T, scale, tl.load(uniform + row), greedy, TILES
    )
    start = tile * TOKENS
    tokens = start + tl.arange(0, TOKENS)
    frozen = load_frozen_logits(logits, row, row_stride, tokens, tokens < V)
    x, _ = steer_tile(frozen, ids, shifts, beta, masked, row, M, K, start, tokens, TOKENS, TAIL)
    x = clean_logits(x)
    chosen = draw_token(
        x,
        frozen,
        tokens,
        target,
        greedy,
        scale,
        peak,
        total,
        frozen_peak,
        frozen_total,
        out,
        row,
        B,
    )
    tl.store(token_out + row, chosen)


@triton.jit
def value_reweight_candidate_values_kernel(
    ids,
    hidden,
    weight,
    bias,
    out,
    B,
    V,
    M,
    K,
    SLOTS: tl.constexpr,
    R: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Compute hidden[b, m] . weight[m, id] + bias[m, id] for SLOTS candidates.

    Grid: (slot blocks, rows, values).
    """
    slots = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    row = tl.program_id(1).to(tl.int64)
    m = tl.program_id(2).to(tl.int64)
    in_row = slots < K
    token = tl.maximum(tl.load(ids + row * K + slots, mask=in_row, other=0), 0) + m * V
    q = tl.zeros((SLOTS,), dtype=tl.float32)
    for start in range(0, R, RANK):
        ranks = start + tl.arange(0, RANK)
        in_rank = ranks < R
        e = tl.load(
            weight + token[:, None] * R + ranks[None, :],
            mask=in_row[:, None] & in_rank[None, :],
            other=0.0,
        )
        u = tl.load(hidden + (row * M + m) * R + ranks, mask=in_rank, other=0.0)
        q += tl.sum(e.to(tl.float32) * u.to(tl.float32)[None, :], axis=1)
    if HAS_BIAS:
        q += tl.load(bias + token, mask=in_row, other=0.0).to(tl.float32)
    tl.store(out + (m * B + row) * K + slots, q, mask=in_row)
