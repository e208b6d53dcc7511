"""Kernels for k candidates per row: their values, their shifts, and the steered logits."""

# Triton compiles these functions and reads their signatures.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from infer_align_kernels.value_reweight.sampling import (
    LARGEST,
    NO_INDEX,
    choose_tile,
    clean_logits,
    draw_token,
    load_frozen_logits,
    log2_scale,
    weigh,
)

# Values of the compile-time argument TAIL. With PER_ROW, `masked` holds a flag per row.
KEEP = tl.constexpr(0)
MASK = tl.constexpr(1)
PER_ROW = tl.constexpr(2)
# Candidates that are loaded at once.
SLOTS_AT_ONCE = tl.constexpr(32)
# Tokens that lie side by side in a part of a tile.
PART = tl.constexpr(128)


@triton.jit
def is_steered(beta, row, ids, M, K):
    """Return True if a row has a non-zero beta and a candidate."""
    strongest = 0.0
    for m in range(M):
        strongest = tl.maximum(strongest, tl.abs(tl.load(beta + row * M + m).to(tl.float32)))
    return (strongest > 0) & (tl.load(ids + row * K) >= 0)


@triton.jit
def is_masked(masked, row, steers, TAIL: tl.constexpr):
    """Return True if the tokens of a row that are no candidates have no weight."""
    # Not a conditional expression: the branch is chosen when the kernel is compiled.
    if TAIL == PER_ROW:
        return steers & (tl.load(masked + row) != 0)
    return steers & (TAIL == MASK)


@triton.jit
def candidates_between(candidates, start, end):
    """Return the candidates with start <= id < end, and a larger number in place of others."""
    return tl.where((candidates >= start) & (candidates < end), candidates, NO_INDEX)


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
    """Add the shifts of the candidates in one tile of a row, and apply the tail."""
    x = frozen
    steers = is_steered(beta, row, ids, M, K)
    if steers:
        x = tl.where(is_masked(masked, row, steers, TAIL), float("-inf"), x)
        for first in range(0, K, SLOTS_AT_ONCE):
            slots = first + tl.arange(0, SLOTS_AT_ONCE)
            candidates = tl.load(ids + row * K + slots, mask=slots < K, other=-1).to(tl.int32)
            shift = tl.load(shifts + row * K + slots, mask=slots < K, other=0.0)
            remaining = candidates_between(candidates, start, start + TOKENS)
            candidate = tl.min(remaining, axis=0)
            while candidate < NO_INDEX:
                of_candidate = tl.sum(tl.where(remaining == candidate, shift, 0.0), axis=0)
                x = tl.where(tokens == candidate, frozen + of_candidate, x)
                remaining = tl.where(remaining == candidate, NO_INDEX, remaining)
                candidate = tl.min(remaining, axis=0)
    return x


@triton.jit
def candidate_shifts(candidates, values, beta, row, B, M, K, slots):
    """Return sum over m of beta_m (v_m - mean of v_m) for the slots of one row.

    An unused slot, and a candidate with a value that is not finite, get -inf.
    """
    in_row = slots < K
    usable = candidates >= 0
    for m in range(M):
        strength = tl.load(beta + row * M + m).to(tl.float32)
        value = tl.load(values + (row + m * B) * K + slots, mask=in_row, other=0.0).to(tl.float32)
        usable = usable & (tl.where(strength != 0, tl.abs(value), 0.0) <= LARGEST)
    count = tl.maximum(tl.sum(usable.to(tl.float32), axis=0), 1.0)
    shift = tl.zeros_like(usable.to(tl.float32))
    for m in range(M):
        strength = tl.load(beta + row * M + m).to(tl.float32)
        value = tl.load(values + (row + m * B) * K + slots, mask=in_row, other=0.0).to(tl.float32)
        value = tl.where(usable, tl.where(strength != 0, value, 0.0), 0.0)
        shift += strength * (value - tl.sum(value, axis=0) / count)
    return tl.where(usable, shift, float("-inf"))


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
    """Compute the shifts of the candidates of one row. Grid: (rows,).

    Without SCATTER, the shifts are stored in `shifts`. With SCATTER, the logits of the candidates
    plus their shifts are stored in `out`.
    """
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, SLOTS)
    in_row = slots < K
    candidates = tl.load(ids + row * K + slots, mask=in_row, other=-1)
    shift = candidate_shifts(candidates, values, beta, row, B, M, K, slots)
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
    x = steer_tile(frozen, ids, shifts, beta, masked, row, M, K, start, tokens, TOKENS, TAIL)
    tl.store(out + row * out_stride + tokens, x, mask=in_row)


@triton.jit
def store_candidates(
    logits, ids, values, beta, candidate_logits, row, B, M, K, row_stride, SLOTS: tl.constexpr
):
    """Store the steered and the frozen logits of the candidates of one row: [2, B, K].

    An unused slot gets -inf.
    """
    slots = tl.arange(0, SLOTS)
    in_row = slots < K
    candidates = tl.load(ids + row * K + slots, mask=in_row, other=-1)
    frozen = load_frozen_logits(logits, row, row_stride, candidates, candidates >= 0)
    shift = candidate_shifts(candidates, values, beta, row, B, M, K, slots)
    steered = frozen + tl.where(is_steered(beta, row, ids, M, K), shift, 0.0)
    pointers = candidate_logits + row * K + slots
    tl.store(pointers, clean_logits(steered), mask=in_row)
    tl.store(pointers + B * K, frozen, mask=in_row)


@triton.jit
def load_candidates(ids, candidate_logits, row, B, K, first):
    """Load some candidates of one row: their ids, their steered and their frozen logits."""
    slots = first + tl.arange(0, SLOTS_AT_ONCE)
    in_row = slots < K
    candidates = tl.load(ids + row * K + slots, mask=in_row, other=-1).to(tl.int32)
    pointers = candidate_logits + row * K + slots
    steered = tl.load(pointers, mask=in_row, other=float("-inf"))
    frozen = tl.load(pointers + B * K, mask=in_row, other=float("-inf"))
    return candidates, steered, frozen


@triton.jit
def value_reweight_candidates_tile_kernel(
    logits,
    ids,
    values,
    beta,
    temperature,
    statistics,
    candidate_logits,
    B,
    V,
    M,
    K,
    T,
    row_stride,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Write the peak and the sum of GROUP tiles of one row, without its candidates: [2, B, T].

    Steering changes nothing but the candidates, so one sum serves both distributions. The first
    program of a row writes the logits of the candidates. Grid: (1 + groups of tiles, rows).
    """
    row = tl.program_id(1).to(tl.int64)
    if tl.program_id(0) == 0:
        store_candidates(
            logits, ids, values, beta, candidate_logits, row, B, M, K, row_stride, SLOTS
        )
    else:
        tiles = (tl.program_id(0) - 1) * GROUP + tl.arange(0, GROUP)
        start = (tl.program_id(0) - 1) * GROUP * TOKENS
        # In this order, each warp has tiles of its own, and a sum needs no other warp.
        places = tl.arange(0, TOKENS // PART)[:, None, None] * PART + tl.arange(0, PART)
        tokens = tiles[None, :, None] * TOKENS + places
        x = load_frozen_logits(logits, row, row_stride, tokens, tokens < V)
        scale = log2_scale(tl.load(temperature + row).to(tl.float32))
        for first in range(0, K, SLOTS_AT_ONCE):
            slots = first + tl.arange(0, SLOTS_AT_ONCE)
            candidates = tl.load(ids + row * K + slots, mask=slots < K, other=-1).to(tl.int32)
            remaining = candidates_between(candidates, start, start + GROUP * TOKENS)
            candidate = tl.min(remaining, axis=0)
            # Few of the groups hold a candidate.
            while candidate < NO_INDEX:
                x = tl.where(tokens == candidate, float("-inf"), x)
                remaining = tl.where(remaining == candidate, NO_INDEX, remaining)
                candidate = tl.min(remaining, axis=0)
        peak = tl.max(tl.max(x, axis=0), axis=1)
        total = tl.sum(tl.sum(weigh(x, peak[None, :, None], scale), axis=0), axis=1)
        pointers = statistics + row * T + tiles
        tl.store(pointers, peak, mask=tiles < T)
        tl.store(pointers + B * T, total, mask=tiles < T)


@triton.jit
def replace_candidates(x, ids, candidate_logits, row, B, K, start, tokens, TOKENS: tl.constexpr):
    """Return the logits of one tile of a row with the steered ones of its candidates."""
    for first in range(0, K, SLOTS_AT_ONCE):
        candidates, steered, _ = load_candidates(ids, candidate_logits, row, B, K, first)
        remaining = candidates_between(candidates, start, start + TOKENS)
        candidate = tl.min(remaining, axis=0)
        while candidate < NO_INDEX:
            logit = tl.max(tl.where(remaining == candidate, steered, float("-inf")), axis=0)
            x = tl.where(tokens == candidate, logit, x)
            remaining = tl.where(remaining == candidate, NO_INDEX, remaining)
            candidate = tl.min(remaining, axis=0)
    return x


@triton.jit
def value_reweight_candidates_pick_kernel(
    logits,
    ids,
    beta,
    masked,
    temperature,
    uniform,
    statistics,
    candidate_logits,
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
    tiles = tl.arange(0, TILES)
    pointers = statistics + row * T + tiles
    frozen_peaks = tl.load(pointers, mask=tiles < T, other=float("-inf"))
    sums = tl.load(pointers + B * T, mask=tiles < T, other=0.0)
    number = tl.load(uniform + row)
    steers = is_steered(beta, row, ids, M, K)
    hides_tail = is_masked(masked, row, steers, TAIL)
    peaks = tl.where(hides_tail, float("-inf"), frozen_peaks)
    peak = tl.max(peaks, axis=0)
    frozen_peak = tl.max(frozen_peaks, axis=0)
    for first in range(0, K, SLOTS_AT_ONCE):
        _, steered, frozen = load_candidates(ids, candidate_logits, row, B, K, first)
        peak = tl.maximum(peak, tl.max(steered, axis=0))
        frozen_peak = tl.maximum(frozen_peak, tl.max(frozen, axis=0))
    weights = sums * weigh(peaks, peak, scale)
    frozen_weights = sums * weigh(frozen_peaks, frozen_peak, scale)
    frozen_total = tl.sum(frozen_weights.to(tl.float64), axis=0)
    peak_tile = tl.min(tl.where(peaks == peak, tiles, NO_INDEX), axis=0)
    for first in range(0, K, SLOTS_AT_ONCE):
        candidates, steered, frozen = load_candidates(ids, candidate_logits, row, B, K, first)
        # An unused slot has no place: as an unsigned number, its id is larger than any other.
        places = (candidates.to(tl.uint32) // TOKENS).to(tl.int32)
        is_place = tiles[None, :] == places[:, None]
        weights += tl.sum(tl.where(is_place, weigh(steered, peak, scale)[:, None], 0.0), axis=0)
        frozen_total += tl.sum(weigh(frozen, frozen_peak, scale).to(tl.float64), axis=0)
        slot_tile = tl.min(tl.where(steered == peak, places, NO_INDEX), axis=0)
        peak_tile = tl.minimum(peak_tile, slot_tile)
    tile, target, total = choose_tile(weights, peak_tile, number, greedy, T)
    # The same sum in the same order, so that such a row is the frozen model bit for bit.
    frozen_total = tl.where(steers, frozen_total.to(tl.float32), total)
    start = tile * TOKENS
    tokens = start + tl.arange(0, TOKENS)
    frozen = load_frozen_logits(logits, row, row_stride, tokens, tokens < V)
    x = tl.where(hides_tail, float("-inf"), frozen)
    x = replace_candidates(x, ids, candidate_logits, row, B, K, start, tokens, TOKENS)
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
