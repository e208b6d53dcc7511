"""Kernels for k candidates a row: their values, their shifts, and the logits with them."""

# ruff: noqa: ANN001, ANN201, D103, N803 - Triton compiles these functions and reads their signatures
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from infer_align_kernels.value_reweight.sampling import (
    LARGEST,
    STATISTICS,
    choose_tile,
    cleaned,
    draw,
    floor,
    frozen_logits,
    log2_scale,
    philox_uniform,
)

KEEP, MASK, PER_ROW = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def steers(beta, row, ids, M, K):
    """Whether a row steers at all: any beta, and a candidate."""
    strongest = 0.0
    for m in range(M):
        strongest = tl.maximum(strongest, tl.abs(tl.load(beta + row * M + m).to(tl.float32)))
    return (strongest > 0) & (tl.load(ids + row * K) >= 0)


@triton.jit
def steered(
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
    """One tile of a row with its candidates at their shifted logits. -> scores, whether any differs from the frozen ones."""
    x = frozen
    changed = False
    if steers(beta, row, ids, M, K):
        if TAIL == PER_ROW:  # noqa: SIM108 - chosen while compiling
            changed = tl.load(masked + row) != 0
        else:
            changed = TAIL == MASK
        x = tl.where(changed, float("-inf"), x)
        for j in range(K):
            found = tl.load(ids + row * K + j)
            if (found >= start) & (found < start + TOKENS):
                x = tl.where(tokens == found, frozen + tl.load(shifts + row * K + j), x)
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
    """sum over m of beta_m (v_m - mean v_m) for the slots of one row; with SCATTER also added to `logits` into `out`."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, SLOTS)
    slots = places < K
    found = tl.load(ids + row * K + places, mask=slots, other=-1)
    usable = found >= 0
    for m in range(M):
        strength = tl.load(beta + row * M + m).to(tl.float32)
        value = tl.load(values + (row + m * B) * K + places, mask=slots, other=0.0).to(tl.float32)
        usable = usable & (tl.where(strength != 0, tl.abs(value), 0.0) <= LARGEST)
    count = tl.maximum(tl.sum(usable.to(tl.float32), axis=0), 1.0)
    shift = tl.zeros((SLOTS,), dtype=tl.float32)
    for m in range(M):
        strength = tl.load(beta + row * M + m).to(tl.float32)
        value = tl.load(values + (row + m * B) * K + places, mask=slots, other=0.0).to(tl.float32)
        value = tl.where(usable, tl.where(strength != 0, value, 0.0), 0.0)
        shift += strength * (value - tl.sum(value, axis=0) / count)
    shift = tl.where(usable, shift, float("-inf"))
    if SCATTER:
        steered = tl.where(steers(beta, row, ids, M, K), found, -1) >= 0
        logit = tl.load(logits + row * row_stride + found, mask=steered, other=0.0).to(tl.float32)
        tl.store(out + row * out_stride + found, logit + shift, mask=steered)
    else:
        tl.store(shifts + row * K + places, shift, mask=slots)


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
    """Write steered logits, the other tokens too."""
    row = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * TOKENS
    tokens = start + tl.arange(0, TOKENS)
    known = tokens < V
    frozen = tl.load(logits + row * row_stride + tokens, mask=known, other=0.0).to(tl.float32)
    x, _ = steered(frozen, ids, shifts, beta, masked, row, M, K, start, tokens, TOKENS, TAIL)
    tl.store(out + row * out_stride + tokens, x, mask=known)


@triton.jit
def value_reweight_candidates_tile_kernel(
    logits,
    bitmask,
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
    mask_stride,
    TOKENS: tl.constexpr,
    HAS_BITMASK: tl.constexpr,
    TAIL: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    start = tile * TOKENS
    tokens = start + tl.arange(0, TOKENS)
    frozen = frozen_logits(
        logits, bitmask, row, row_stride, mask_stride, tokens, tokens < V, HAS_BITMASK
    )
    scale = log2_scale(tl.load(temperature + row).to(tl.float32))
    frozen_peak = tl.max(frozen, axis=0)
    frozen_total = tl.sum(tl.exp2((frozen - floor(frozen_peak)) * scale), axis=0)
    peak = frozen_peak
    total = frozen_total
    x, changed = steered(frozen, ids, shifts, beta, masked, row, M, K, start, tokens, TOKENS, TAIL)
    x = cleaned(x)
    if changed:
        peak = tl.max(x, axis=0)
        total = tl.sum(tl.exp2((x - floor(peak)) * scale), axis=0)
    largest = tl.min(tl.where(x == peak, tokens, 2147483647), axis=0)
    at = statistics + tile.to(tl.int64) * STATISTICS * B + row
    tl.store(at, peak)
    tl.store(at + B, total)
    tl.store(at + 2 * B, largest.to(tl.float32))
    tl.store(at + 3 * B, frozen_peak)
    tl.store(at + 4 * B, frozen_total)


@triton.jit
def value_reweight_candidates_pick_kernel(
    logits,
    bitmask,
    ids,
    shifts,
    beta,
    masked,
    temperature,
    seed,
    step,
    statistics,
    token_out,
    out,
    B,
    V,
    M,
    K,
    T,
    row_stride,
    mask_stride,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_BITMASK: tl.constexpr,
    TAIL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + row).to(tl.float32)
    scale = log2_scale(heat)
    greedy = heat <= 0
    uniform = philox_uniform(tl.load(seed + row), tl.load(step + row))
    tile, residual, largest, peak, total, frozen_peak, frozen_total = choose_tile(
        statistics, row, B, T, scale, uniform, greedy, TILES
    )
    start = tile * TOKENS
    tokens = start + tl.arange(0, TOKENS)
    frozen = frozen_logits(
        logits, bitmask, row, row_stride, mask_stride, tokens, tokens < V, HAS_BITMASK
    )
    x, _ = steered(frozen, ids, shifts, beta, masked, row, M, K, start, tokens, TOKENS, TAIL)
    x = cleaned(x)
    chosen = draw(
        x,
        frozen,
        tokens,
        residual,
        largest,
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
    """hidden[b, m] . weight[m, id] for SLOTS candidates of one row and one value."""
    places = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    row = tl.program_id(1).to(tl.int64)
    m = tl.program_id(2).to(tl.int64)
    slots = places < K
    token = tl.maximum(tl.load(ids + row * K + places, mask=slots, other=0), 0) + m * V
    q = tl.zeros((SLOTS,), dtype=tl.float32)
    for start in range(0, R, RANK):
        ranks = start + tl.arange(0, RANK)
        left = ranks < R
        e = tl.load(
            weight + token[:, None] * R + ranks[None, :],
            mask=slots[:, None] & left[None, :],
            other=0.0,
        )
        u = tl.load(hidden + (row * M + m) * R + ranks, mask=left, other=0.0)
        q += tl.sum(e.to(tl.float32) * u.to(tl.float32)[None, :], axis=1)
    if HAS_BIAS:
        q += tl.load(bias + token, mask=slots, other=0.0).to(tl.float32)
    tl.store(out + (m * B + row) * K + places, q, mask=slots)
