"""The parts of the steering kernels that are the same for all kinds of candidates."""

# Triton compiles these functions and reads their signatures.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from infer_align_kernels.steer_logits.types import SteeredRows

LARGEST = tl.constexpr(3.4028234663852886e38)
# The columns of a row's record, before its weights.
ROW = tl.constexpr(0)
COUNT = tl.constexpr(1)
MASKED = tl.constexpr(2)
LOG_MIN_P = tl.constexpr(3)
WEIGHTS = tl.constexpr(SteeredRows.COLUMNS)
# The COUNT of a row whose candidates are its likely tokens.
LIKELY = tl.constexpr(SteeredRows.LIKELY)
# Features per step of a value.
RANK = 16


@triton.jit
def strongest_weight(beta, M):
    """Return the largest absolute weight of a row."""
    strongest = 0.0
    for m in range(M):
        strongest = tl.maximum(strongest, tl.abs(tl.load(beta + m)))
    return strongest


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
def usable_shifts(shift, is_candidate):
    """Return the finite shifts of candidates, 0 elsewhere, and where these are."""
    # The comparison is False for NaN.
    usable = is_candidate & (tl.abs(shift) <= LARGEST)
    return tl.where(usable, shift, 0.0), usable
