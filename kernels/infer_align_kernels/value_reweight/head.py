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

# Where the exponent of a float32 number begins, and what is added to it when it is stored.
EXPONENT_AT = tl.constexpr(23)
EXPONENT_BIAS = tl.constexpr(127)
# The exponent to which the largest number of a row is brought: float16 has numbers below 2^16.
HALF_EXPONENT = tl.constexpr(14)
# The stored exponents of a row whose scale and its inverse are normal numbers.
LOWEST = tl.constexpr(15)
HIGHEST = tl.constexpr(254)


@triton.jit
def power_of_two(exponent):
    """Return 2^exponent, for exponents of normal numbers."""
    return ((exponent + EXPONENT_BIAS) << EXPONENT_AT).to(tl.float32, bitcast=True)


@triton.jit
def split(x):
    """Split the rows of a float32 tensor: x = scale * (high + low), with parts in float16.

    Both parts together hold the fraction of a float32 number, or all of it but its last bit. The
    scale is a power of two per row, because float16 has a small range.
    """
    # Of a number and NaN, this returns the number.
    largest = tl.max(tl.maximum(tl.abs(x), 0.0), axis=1).to(tl.int32, bitcast=True)
    stored = tl.minimum(tl.maximum(largest >> EXPONENT_AT, LOWEST), HIGHEST)
    exponent = stored - EXPONENT_BIAS - HALF_EXPONENT
    scaled = x * power_of_two(-exponent)[:, None]
    high = scaled.to(tl.float16)
    low = (scaled - high.to(tl.float32)).to(tl.float16)
    return high, low, power_of_two(exponent)


@triton.jit
def value_reweight_split_kernel(
    hidden, parts, scales, N, R, ROWS: tl.constexpr, RANK: tl.constexpr
):
    """Split ROWS rows of features: [N, R] -> parts [2, N, R], scales [N]. Grid: (row blocks,)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = rows.to(tl.int64)
    ranks = tl.arange(0, RANK)
    offsets = row[:, None] * R + ranks[None, :]
    is_used = (rows < N)[:, None] & (ranks < R)[None, :]
    high, low, scale = split(tl.load(hidden + offsets, mask=is_used, other=0.0).to(tl.float32))
    tl.store(parts + offsets, high, mask=is_used)
    tl.store(parts + tl.cast(N, tl.int64) * R + offsets, low, mask=is_used)
    tl.store(scales + row, scale, mask=rows < N)


@triton.jit
def load_weight(
    weight,
    token,
    in_vocabulary,
    start,
    R: tl.constexpr,
    RANK: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Load RANK numbers of the head for some tokens: two parts, and a scale per token.

    Without IS_SPLIT, the first part is all of it.
    """
    ranks = start + tl.arange(0, RANK)
    is_used = in_vocabulary[:, None] & (ranks < R)[None, :]
    e = tl.load(weight + token[:, None] * R + ranks[None, :], mask=is_used, other=0.0)
    if IS_SPLIT:
        high, low, scale = split(e)
    else:
        high = e.to(tl.float32) if UPCAST else e
        low = high
        scale = 1.0
    return high, low, scale


@triton.jit
def head_values(
    hidden,
    scales,
    row,
    N,
    in_batch,
    weight,
    bias,
    token,
    in_vocabulary,
    high,
    low,
    scale,
    R: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_HELD: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return the values of some tokens for some rows of the N rows of features, in float32.

    With IS_HELD, the tokens' part of the head is what `load_weight` returned. Tensor cores read few
    bits of a float32 number, so such numbers come in two parts. The product of both lower parts is
    below the precision of float32.
    """
    q = tl.zeros((row.shape[0], token.shape[0]), dtype=tl.float32)
    if HAS_BIAS:
        token_bias = tl.load(bias + token, mask=in_vocabulary, other=0.0)
        q += token_bias.to(tl.float32)[None, :]
    for start in range(0, R, RANK):
        if not IS_HELD:
            high, low, scale = load_weight(
                weight, token, in_vocabulary, start, R, RANK, IS_SPLIT, UPCAST
            )
        ranks = start + tl.arange(0, RANK)
        is_used = in_batch[:, None] & (ranks < R)[None, :]
        pointers = hidden + row[:, None] * R + ranks[None, :]
        u = tl.load(pointers, mask=is_used, other=0.0).to(high.dtype)
        if IS_SPLIT:
            u_low = tl.load(pointers + tl.cast(N, tl.int64) * R, mask=is_used, other=0.0)
            part = tl.dot(u_low, tl.trans(high))
            part = tl.dot(u, tl.trans(low), part)
            part = tl.dot(u, tl.trans(high), part)
            row_scale = tl.load(scales + row, mask=in_batch, other=1.0)[:, None]
            q += part * scale[None, :] * row_scale
        else:
            q = tl.dot(u, tl.trans(high), q, input_precision="ieee")
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
    scales,
    weight,
    bias,
    beta,
    temperature,
    statistics,
    B,
    V,
    row_stride,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    R: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write the statistics of one tile of tokens, for ROWS rows at a time. Grid: (tiles,)."""
    tile = tl.program_id(0)
    tokens = tile * TOKENS + tl.arange(0, TOKENS)
    token = tokens.to(tl.int64)
    in_vocabulary = tokens < V
    # The part of the head of one value of a small rank is loaded once for all rows.
    is_held: tl.constexpr = M == 1 and R <= RANK
    high, low, scale = load_weight(weight, token, in_vocabulary, 0, R, RANK, IS_SPLIT, UPCAST)
    for first in range(0, B, ROWS):
        rows = first + tl.arange(0, ROWS)
        row = rows.to(tl.int64)
        in_batch = rows < B
        for m in tl.static_range(M):
            q = head_values(
                hidden,
                scales,
                row * M + m,
                B * M,
                in_batch,
                weight,
                bias,
                token + m * V,
                in_vocabulary,
                high,
                low,
                scale,
                R,
                RANK,
                HAS_BIAS,
                is_held,
                IS_SPLIT,
                UPCAST,
            )
            strength = tl.load(beta + row * M + m, mask=in_batch, other=0.0).to(tl.float32)[:, None]
            # Not before the first product, whose operands need the registers.
            if m == 0:
                is_logit = in_batch[:, None] & in_vocabulary[None, :]
                frozen = load_frozen_logits(
                    logits, row[:, None], row_stride, tokens[None, :], is_logit
                )
                x = frozen
            x += strength * tl.where(strength != 0, q, 0.0)
        row_temperature = tl.load(temperature + row, mask=in_batch, other=1.0).to(tl.float32)
        inverse = log2_scale(row_temperature)[:, None]
        x = clean_logits(x)
        peak = tl.max(x, axis=1)
        frozen_peak = tl.max(frozen, axis=1)
        pointers = statistics + (tile.to(tl.int64) * B + row) * STATISTICS
        tl.store(pointers, peak, mask=in_batch)
        tl.store(pointers + 1, tl.sum(weigh(x, peak[:, None], inverse), axis=1), mask=in_batch)
        tl.store(pointers + 2, frozen_peak, mask=in_batch)
        frozen_sum = tl.sum(weigh(frozen, frozen_peak[:, None], inverse), axis=1)
        tl.store(pointers + 3, frozen_sum, mask=in_batch)


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
    scales,
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
    IS_SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add the weighted values of one tile of tokens, to ROWS rows at a time. Grid: (tiles,)."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    token = tokens.to(tl.int64)
    in_vocabulary = tokens < V
    # The part of a head of a small rank is loaded once for all rows.
    is_held: tl.constexpr = R <= RANK
    high, low, scale = load_weight(weight, token, in_vocabulary, 0, R, RANK, IS_SPLIT, UPCAST)
    for first in range(0, B, ROWS):
        rows = first + tl.arange(0, ROWS)
        row = rows.to(tl.int64)
        in_batch = rows < B
        q = head_values(
            hidden,
            scales,
            row,
            B,
            in_batch,
            weight,
            bias,
            token,
            in_vocabulary,
            high,
            low,
            scale,
            R,
            RANK,
            HAS_BIAS,
            is_held,
            IS_SPLIT,
            UPCAST,
        )
        strength = tl.load(beta + row, mask=in_batch, other=0.0)
        target = row
        if HAS_INDICES:
            target = tl.load(indices + row, mask=in_batch, other=0)
        pointers = logits + target[:, None] * row_stride + tokens[None, :]
        # A row of strength 0 is not written, so it stays bit for bit the same.
        written = (in_batch & (strength != 0))[:, None] & in_vocabulary[None, :]
        x = tl.load(pointers, mask=written, other=0.0)
        tl.store(pointers, x + strength[:, None] * q, mask=written)
