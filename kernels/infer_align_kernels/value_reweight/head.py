"""Kernels for a low-rank head. Its values are computed tile by tile and never stored."""

# Triton compiles these functions and reads their signatures.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from infer_align_kernels.value_reweight.sampling import (
    NO_INDEX,
    choose_tile,
    clean_logits,
    draw_token,
    load_frozen_logits,
    log2_scale,
    weigh,
)

# The statistics of a tile, in this order: peak and sum of the steered logits, peak and sum of the
# frozen logits. A sum is that of exp((logit - peak) / temperature).
STATISTICS = tl.constexpr(4)

# The bits of a float32 number that tensor cores read, as a mask.
TF32_BITS = tl.constexpr(-8192)


@triton.jit
def high_part(x):
    """Return the part of float32 numbers that tensor cores multiply exactly."""
    return (x.to(tl.int32, bitcast=True) & TF32_BITS).to(tl.float32, bitcast=True)


@triton.jit
def add_product(u, e, q, UPCAST: tl.constexpr):
    """Return q + u e^T: [ROWS, RANK], [TOKENS, RANK] -> [ROWS, TOKENS] float32.

    Tensor cores read 11 bits of the fraction of a float32 number. So such numbers are split in two
    parts of as many bits. The product of both lower parts is below the precision of float32.
    """
    if UPCAST:
        u, e = u.to(tl.float32), e.to(tl.float32)
    if u.dtype == tl.float32:
        u_high, e_high = high_part(u), high_part(e)
        q = tl.dot(u - u_high, tl.trans(e_high), q, input_precision="tf32")
        q = tl.dot(u_high, tl.trans(e - e_high), q, input_precision="tf32")
        q = tl.dot(u_high, tl.trans(e_high), q, input_precision="tf32")
    else:
        q = tl.dot(u, tl.trans(e), q, input_precision="ieee")
    return q


@triton.jit
def load_statistics(statistics, row, B, T, tiles):
    """Load the statistics of some tiles of one row: two peaks, each with its sum."""
    in_row = tiles < T
    pointers = statistics + (tiles.to(tl.int64) * B + row) * STATISTICS
    peaks = tl.load(pointers, mask=in_row, other=float("-inf"))
    sums = tl.load(pointers + 1, mask=in_row, other=0.0)
    frozen_peaks = tl.load(pointers + 2, mask=in_row, other=float("-inf"))
    frozen_sums = tl.load(pointers + 3, mask=in_row, other=0.0)
    return peaks, sums, frozen_peaks, frozen_sums


@triton.jit
def value_reweight_head_tile_kernel(
    logits,
    hidden,
    weight,
    bias,
    beta,
    temperature,
    statistics,
    B,
    V,
    M,
    row_stride,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    R: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write the statistics of one tile of tokens for ROWS rows. Grid: (row blocks, tiles)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = rows.to(tl.int64)
    tile = tl.program_id(1)
    tokens = tile * TOKENS + tl.arange(0, TOKENS)
    token = tokens.to(tl.int64)
    in_batch = rows < B
    in_vocabulary = tokens < V
    frozen_pointers = logits + row[:, None] * row_stride + tokens[None, :]
    in_logits = in_batch[:, None] & in_vocabulary[None, :]
    frozen = tl.load(frozen_pointers, mask=in_logits, other=float("-inf")).to(tl.float32)
    frozen = clean_logits(frozen)
    row_temperature = tl.load(temperature + row, mask=in_batch, other=1.0).to(tl.float32)
    scale = log2_scale(row_temperature)[:, None]
    frozen_peak = tl.max(frozen, axis=1)
    frozen_total = tl.sum(weigh(frozen, frozen_peak[:, None], scale), axis=1)
    pointers = statistics + (tile.to(tl.int64) * B + row) * STATISTICS
    tl.store(pointers + 2, frozen_peak, mask=in_batch)
    tl.store(pointers + 3, frozen_total, mask=in_batch)
    x = frozen
    for m in range(M):
        q = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
        for start in range(0, R, RANK):
            ranks = start + tl.arange(0, RANK)
            in_rank = ranks < R
            e = tl.load(
                weight + (token[:, None] + m * V) * R + ranks[None, :],
                mask=in_vocabulary[:, None] & in_rank[None, :],
                other=0.0,
            )
            u = tl.load(
                hidden + (row[:, None] * M + m) * R + ranks[None, :],
                mask=in_batch[:, None] & in_rank[None, :],
                other=0.0,
            )
            q = add_product(u.to(e.dtype), e, q, UPCAST)
        if HAS_BIAS:
            token_bias = tl.load(bias + token + m * V, mask=in_vocabulary, other=0.0)
            q += token_bias.to(tl.float32)[None, :]
        strength = tl.load(beta + row * M + m, mask=in_batch, other=0.0).to(tl.float32)[:, None]
        x += strength * tl.where(strength != 0, q, 0.0)
    x = clean_logits(x)
    peak = tl.max(x, axis=1)
    total = tl.sum(weigh(x, peak[:, None], scale), axis=1)
    tl.store(pointers, peak, mask=in_batch)
    tl.store(pointers + 1, total, mask=in_batch)


@triton.jit
def value_reweight_head_pick_kernel(
    logits,
    hidden,
    weight,
    bias,
    beta,
    temperature,
    uniform,
    statistics,
    token_out,
    out,
    B,
    V,
    M,
    T,
    row_stride,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    R: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Choose a tile of one row, compute its values again, and draw the token. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    row_temperature = tl.load(temperature + row).to(tl.float32)
    scale = log2_scale(row_temperature)
    greedy = row_temperature <= 0
    tiles = tl.arange(0, TILES)
    peaks, sums, frozen_peaks, frozen_sums = load_statistics(statistics, row, B, T, tiles)
    peak = tl.max(peaks, axis=0)
    frozen_peak = tl.max(frozen_peaks, axis=0)
    frozen_weights = (frozen_sums * weigh(frozen_peaks, frozen_peak, scale)).to(tl.float64)
    frozen_total = tl.sum(frozen_weights, axis=0).to(tl.float32)
    weights = sums * weigh(peaks, peak, scale)
    peak_tile = tl.min(tl.where(peaks == peak, tiles, NO_INDEX), axis=0)
    tile, target, total = choose_tile(weights, peak_tile, tl.load(uniform + row), greedy, T)
    tokens = tile * TOKENS + tl.arange(0, TOKENS)
    token = tokens.to(tl.int64)
    in_vocabulary = tokens < V
    frozen = load_frozen_logits(logits, row, row_stride, tokens, in_vocabulary)
    x = frozen
    for m in range(M):
        q = tl.zeros((TOKENS,), dtype=tl.float32)
        for start in range(0, R, RANK):
            ranks = start + tl.arange(0, RANK)
            in_rank = ranks < R
            e = tl.load(
                weight + (token[:, None] + m * V) * R + ranks[None, :],
                mask=in_vocabulary[:, None] & in_rank[None, :],
                other=0.0,
            )
            u = tl.load(hidden + (row * M + m) * R + ranks, mask=in_rank, other=0.0).to(e.dtype)
            q += tl.sum(e.to(tl.float32) * u.to(tl.float32)[None, :], axis=1)
        if HAS_BIAS:
            q += tl.load(bias + token + m * V, mask=in_vocabulary, other=0.0).to(tl.float32)
        strength = tl.load(beta + row * M + m).to(tl.float32)
        x += tl.where(strength != 0, strength * q, 0.0)
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
def value_reweight_add_head_kernel(
    logits,
    indices,
    hidden,
    weight,
    bias,
    beta,
    B,
    V,
    row_stride,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    R: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INDICES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add the weighted values of one tile of tokens to ROWS rows. Grid: (row blocks, tiles)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = rows.to(tl.int64)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    token = tokens.to(tl.int64)
    in_batch = rows < B
    in_vocabulary = tokens < V
    q = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for start in range(0, R, RANK):
        ranks = start + tl.arange(0, RANK)
        in_rank = ranks < R
        e = tl.load(
            weight + token[:, None] * R + ranks[None, :],
            mask=in_vocabulary[:, None] & in_rank[None, :],
            other=0.0,
        )
        u = tl.load(
            hidden + row[:, None] * R + ranks[None, :],
            mask=in_batch[:, None] & in_rank[None, :],
            other=0.0,
        )
        q = add_product(u.to(e.dtype), e, q, UPCAST)
    if HAS_BIAS:
        token_bias = tl.load(bias + token, mask=in_vocabulary, other=0.0)
        q += token_bias.to(tl.float32)[None, :]
    strength = tl.load(beta + row, mask=in_batch, other=0.0)
    target = row
    if HAS_INDICES:
        target = tl.load(indices + row, mask=in_batch, other=0)
    pointers = logits + target[:, None] * row_stride + tokens[None, :]
    # A row of strength 0 is not written, so it stays bit for bit the same.
    written = (in_batch & (strength != 0))[:, None] & in_vocabulary[None, :]
    x = tl.load(pointers, mask=written, other=0.0)
    tl.store(pointers, x + strength[:, None] * q, mask=written)
