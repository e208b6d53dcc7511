"""Device functions: logits as they count, tile statistics merged, and one token drawn by inverse CDF."""

# ruff: noqa: ANN001, ANN201, D103, N803, PLR0124 - Triton compiles these functions and reads their signatures
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(3.4028234663852886e38)
COLDEST = tl.constexpr(1e-30)
# Per tile and row: peak, sum and place of the largest of the steered logits; peak and sum of the frozen ones.
STATISTICS = tl.constexpr(5)


@triton.jit
def cleaned(x):
    """NaN is never chosen; +inf counts as the largest number."""
    return tl.minimum(tl.where(x != x, float("-inf"), x), LARGEST)


@triton.jit
def frozen_logits(
    logits, bitmask, row, row_stride, mask_stride, tokens, inside, HAS_BITMASK: tl.constexpr
):
    x = tl.load(logits + row * row_stride + tokens, mask=inside, other=float("-inf")).to(tl.float32)
    if HAS_BITMASK:
        word = tl.load(bitmask + row * mask_stride + tokens // 32, mask=inside, other=0)
        x = tl.where(((word >> (tokens % 32)) & 1) != 0, x, float("-inf"))
    return cleaned(x)


@triton.jit
def log2_scale(temperature):
    """log2(e) / temperature; at 0 or below log2(e): greedy rows report the logprobs of temperature 1."""
    return tl.where(temperature > 0, LOG2_E / tl.maximum(temperature, COLDEST), LOG2_E)


@triton.jit
def floor(peak):
    """A peak of -inf as the lowest number, so that -inf minus it stays -inf."""
    return tl.maximum(peak, -LARGEST)


@triton.jit
def philox_uniform(seed, step):
    """53 bits of one Philox draw as a float64 in [0, 1)."""
    zero = step * 0
    high, low, _, _ = tl.philox(seed, step, zero, zero, zero)
    return (
        high.to(tl.float64) * 2.3283064365386963e-10
        + (low >> 11).to(tl.float64) * 1.1102230246251565e-16
    )


@triton.jit
def reach(cdf, weights, target, places):
    """The first place whose cumulative weight passes the target; the last with any weight, where rounding hid it."""
    beyond = tl.min(tl.where((cdf > target) & (weights > 0), places, 2147483647), axis=0)
    last = tl.max(tl.where(weights > 0, places, 0), axis=0)
    return tl.minimum(beyond, last)


@triton.jit
def choose_tile(statistics, row, B, T, scale, uniform, greedy, TILES: tl.constexpr):
    """Merge the tiles of a row. -> tile, what is left of the draw in it, largest token, and peak and sum, steered and frozen."""
    places = tl.arange(0, TILES)
    inside = places < T
    at = statistics + places.to(tl.int64) * STATISTICS * B + row
    peaks = tl.load(at, mask=inside, other=float("-inf"))
    sums = tl.load(at + B, mask=inside, other=0.0)
    frozen_peaks = tl.load(at + 3 * B, mask=inside, other=float("-inf"))
    frozen_sums = tl.load(at + 4 * B, mask=inside, other=0.0)
    peak = tl.max(peaks, axis=0)
    frozen_peak = tl.max(frozen_peaks, axis=0)
    weights = (sums * tl.exp2((peaks - floor(peak)) * scale)).to(tl.float64)
    frozen_weights = (frozen_sums * tl.exp2((frozen_peaks - floor(frozen_peak)) * scale)).to(
        tl.float64
    )
    cdf = tl.cumsum(weights, axis=0)
    total = tl.sum(weights, axis=0)
    target = uniform * total
    hottest = tl.min(tl.where((peaks == peak) & inside, places, TILES - 1), axis=0)
    tile = tl.where(greedy, hottest, reach(cdf, weights, target, places))
    tile = tl.minimum(tile, T - 1)
    before = tl.sum(tl.where(places == tile, cdf - weights, 0.0), axis=0)
    largest = tl.load(statistics + (tile.to(tl.int64) * STATISTICS + 2) * B + row).to(tl.int32)
    return (
        tile,
        target - before,
        largest,
        peak,
        total.to(tl.float32),
        frozen_peak,
        tl.sum(frozen_weights, axis=0).to(tl.float32),
    )


@triton.jit
def draw(
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
):
    """The token within its tile, and what is reported of it. `out`: token [B] int64 comes apart; lse, logprob, frozen [3, B]."""
    weights = tl.exp2((x - floor(peak)) * scale)
    drawn = reach(tl.cumsum(weights.to(tl.float64), axis=0), weights, residual, tokens)
    token = tl.where(greedy, largest, drawn)
    logit = tl.where(greedy, peak, tl.sum(tl.where(tokens == token, x, 0.0), axis=0))
    frozen_logit = tl.sum(tl.where(tokens == token, frozen, 0.0), axis=0)
    found = peak > float("-inf")
    natural = scale / LOG2_E
    log_total = tl.log(tl.where(found, total, 1.0))
    tl.store(out + row, tl.where(found, peak * natural + log_total, float("-inf")))
    tl.store(
        out + B + row, tl.where(found, (logit - floor(peak)) * natural - log_total, float("-inf"))
    )
    frozen_logprob = (frozen_logit - floor(frozen_peak)) * natural - tl.log(
        tl.where(found, frozen_total, 1.0)
    )
    tl.store(out + 2 * B + row, tl.where(found, frozen_logprob, float("-inf")))
    return tl.where(found, token, -1).to(tl.int64)
