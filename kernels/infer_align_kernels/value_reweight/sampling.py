"""Device functions shared by the kernels: logits, weights, and the draw of a token.

A kernel that reads all logits writes a peak and a sum of weights per row and tile. A second kernel
merges those of a row, chooses a tile with `choose_tile`, and draws the token in it with
`draw_token`.
"""

# Triton compiles these functions and reads their signatures.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(3.4028234663852886e38)
MIN_TEMPERATURE = tl.constexpr(1e-30)
# Larger than every token id and tile index.
NO_INDEX = tl.constexpr(2147483647)


@triton.jit
def clean_logits(x):
    """Replace NaN by -inf, so that it is never chosen, and +inf by the largest number."""
    # Of a number and NaN, both functions return the number.
    return tl.minimum(tl.maximum(x, float("-inf")), LARGEST)


@triton.jit
def load_frozen_logits(logits, row, row_stride, tokens, in_row):
    """Load the logits of some tokens of a row; tokens outside the row get -inf."""
    x = tl.load(logits + row * row_stride + tokens, mask=in_row, other=float("-inf"))
    return clean_logits(x.to(tl.float32))


@triton.jit
def log2_scale(temperature):
    """Return log2(e) / temperature; for greedy rows log2(e), as at temperature 1."""
    return tl.where(temperature > 0, LOG2_E / tl.maximum(temperature, MIN_TEMPERATURE), LOG2_E)


@triton.jit
def finite_peak(peak):
    """Replace a peak of -inf by the lowest number, so that -inf minus the peak stays -inf."""
    return tl.maximum(peak, -LARGEST)


@triton.jit
def first_above(cumulative, weights, target, indices):
    """Return the first index whose cumulative weight exceeds the target.

    Rounding can hide that index. The result is then the last index with a weight.
    """
    is_above = (cumulative > target) & (weights > 0)
    first = tl.min(tl.where(is_above, indices, NO_INDEX), axis=0)
    last = tl.max(tl.where(weights > 0, indices, 0), axis=0)
    return tl.minimum(first, last)


@triton.jit
def weigh(x, peak, scale):
    """Return exp((x - peak) / temperature); 0 where x is -inf."""
    return tl.exp2((x - finite_peak(peak)) * scale)


@triton.jit
def choose_tile(weights, peak_tile, uniform, greedy, T):
    """Choose the tile of the token of one row from the weights of its T tiles.

    `peak_tile` is the tile of the largest logit. Returns the tile, the rest of the target inside
    it, and the sum of the weights.
    """
    tiles = tl.arange(0, weights.shape[0])
    weights = weights.to(tl.float64)
    cumulative = tl.cumsum(weights, axis=0)
    total = tl.sum(weights, axis=0)
    target = uniform * total
    drawn_tile = first_above(cumulative, weights, target, tiles)
    tile = tl.minimum(tl.where(greedy, peak_tile, drawn_tile), T - 1)
    preceding = tl.sum(tl.where(tiles == tile, cumulative - weights, 0.0), axis=0)
    return tile, target - preceding, total.to(tl.float32)


@triton.jit
def draw_token(
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
):
    """Draw the token in its tile and store the row's numbers.

    `x` and `frozen` are the steered and the frozen logits of the tile. `out` is [3, B]: logsumexp,
    logprob, frozen logprob. Returns the token as int64, or -1 for a row without a finite logit.
    """
    weights = weigh(x, peak, scale)
    drawn = first_above(tl.cumsum(weights.to(tl.float64), axis=0), weights, target, tokens)
    largest = tl.min(tl.where(x == tl.max(x, axis=0), tokens, NO_INDEX), axis=0)
    token = tl.where(greedy, largest, drawn)
    logit = tl.where(greedy, peak, tl.sum(tl.where(tokens == token, x, 0.0), axis=0))
    frozen_logit = tl.sum(tl.where(tokens == token, frozen, 0.0), axis=0)
    has_token = peak > float("-inf")
    inverse_temperature = scale / LOG2_E
    log_total = tl.log(tl.where(has_token, total, 1.0))
    frozen_log_total = tl.log(tl.where(has_token, frozen_total, 1.0))
    logsumexp = peak * inverse_temperature + log_total
    logprob = (logit - finite_peak(peak)) * inverse_temperature - log_total
    frozen_logprob = (frozen_logit - finite_peak(frozen_peak)) * inverse_temperature
    frozen_logprob -= frozen_log_total
    tl.store(out + row, tl.where(has_token, logsumexp, float("-inf")))
    tl.store(out + B + row, tl.where(has_token, logprob, float("-inf")))
    tl.store(out + 2 * B + row, tl.where(has_token, frozen_logprob, float("-inf")))
    return tl.where(has_token, token, -1).to(tl.int64)
