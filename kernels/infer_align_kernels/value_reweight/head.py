"""Kernels for a low-rank head: its values are made tile by tile and never stored."""

# ruff: noqa: ANN001, ANN201, D103, N803, PLR0915 - Triton compiles these functions and reads their signatures
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from infer_align_kernels.value_reweight.sampling import (
    STATISTICS,
    choose_tile,
    cleaned,
    draw,
    floor,
    frozen_logits,
    log2_scale,
    philox_uniform,
)


@triton.jit
def value_reweight_head_tile_kernel(
    logits,
    bitmask,
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
    mask_stride,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    R: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_BITMASK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = rows.to(tl.int64)
    tile = tl.program_id(1)
    tokens = tile * TOKENS + tl.arange(0, TOKENS)
    token = tokens.to(tl.int64)
    live = rows < B
    known = tokens < V
    inside = live[:, None] & known[None, :]
    frozen = cleaned(
        tl.load(
            logits + row[:, None] * row_stride + tokens[None, :], mask=inside, other=float("-inf")
        ).to(tl.float32)
    )
    if HAS_BITMASK:
        words = tile * (TOKENS // 32) + tl.arange(0, TOKENS // 32)
        word = tl.load(
            bitmask + row[:, None] * mask_stride + words[None, :],
            mask=live[:, None] & (words < tl.cdiv(V, 32))[None, :],
            other=0,
        )
        bits = (word[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        frozen = tl.where(tl.reshape(bits, (ROWS, TOKENS)) != 0, frozen, float("-inf"))
    scale = log2_scale(tl.load(temperature + row, mask=live, other=1.0).to(tl.float32))[:, None]
    at = statistics + tile.to(tl.int64) * STATISTICS * B + row
    frozen_peak = tl.max(frozen, axis=1)
    frozen_total = tl.sum(tl.exp2((frozen - floor(frozen_peak)[:, None]) * scale), axis=1)
    tl.store(at + 3 * B, frozen_peak, mask=live)
    tl.store(at + 4 * B, frozen_total, mask=live)
    x = frozen
    for m in range(M):
        q = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
        for start in range(0, R, RANK):
            ranks = start + tl.arange(0, RANK)
            left = ranks < R
            e = tl.load(
                weight + (token[:, None] + m * V) * R + ranks[None, :],
                mask=known[:, None] & left[None, :],
                other=0.0,
            )
            u = tl.load(
                hidden + (row[:, None] * M + m) * R + ranks[None, :],
                mask=live[:, None] & left[None, :],
                other=0.0,
            )
            u = u.to(e.dtype)
            if UPCAST:
                u, e = u.to(tl.float32), e.to(tl.float32)
            q = tl.dot(u, tl.trans(e), q, input_precision="ieee")
        if HAS_BIAS:
            q += tl.load(bias + token + m * V, mask=known, other=0.0).to(tl.float32)[None, :]
        strength = tl.load(beta + row * M + m, mask=live, other=0.0).to(tl.float32)[:, None]
        x += tl.where(strength != 0, strength * q, 0.0)
    x = cleaned(x)
    peak = tl.max(x, axis=1)
    total = tl.sum(tl.exp2((x - floor(peak)[:, None]) * scale), axis=1)
    largest = tl.min(tl.where(x == peak[:, None], tokens[None, :], 2147483647), axis=1)
    tl.store(at, peak, mask=live)
    tl.store(at + B, total, mask=live)
    tl.store(at + 2 * B, largest.to(tl.float32), mask=live)


@triton.jit
def value_reweight_head_pick_kernel(
    logits,
    bitmask,
    hidden,
    weight,
    bias,
    beta,
    temperature,
    seed,
    step,
    statistics,
    token_out,
    out,
    B,
    V,
    M,
    T,
    row_stride,
    mask_stride,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    R: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_BITMASK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + row).to(tl.float32)
    scale = log2_scale(heat)
    greedy = heat <= 0
    uniform = philox_uniform(tl.load(seed + row), tl.load(step + row))
    tile, residual, largest, peak, total, frozen_peak, frozen_total = choose_tile(
        statistics, row, B, T, scale, uniform, greedy, TILES
    )
    tokens = tile * TOKENS + tl.arange(0, TOKENS)
    token = tokens.to(tl.int64)
    known = tokens < V
    frozen = frozen_logits(
        logits, bitmask, row, row_stride, mask_stride, tokens, known, HAS_BITMASK
    )
    x = frozen
    for m in range(M):
        q = tl.zeros((TOKENS,), dtype=tl.float32)
        for start in range(0, R, RANK):
            ranks = start + tl.arange(0, RANK)
            left = ranks < R
            e = tl.load(
                weight + (token[:, None] + m * V) * R + ranks[None, :],
                mask=known[:, None] & left[None, :],
                other=0.0,
            )
            u = tl.load(hidden + (row * M + m) * R + ranks, mask=left, other=0.0).to(e.dtype)
            q += tl.sum(e.to(tl.float32) * u.to(tl.float32)[None, :], axis=1)
        if HAS_BIAS:
            q += tl.load(bias + token + m * V, mask=known, other=0.0).to(tl.float32)
        strength = tl.load(beta + row * M + m).to(tl.float32)
        x += tl.where(strength != 0, strength * q, 0.0)
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
