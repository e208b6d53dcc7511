"""Sibling attention in Triton: one pass over a row's prefix for all siblings and all heads that share a key head."""

# ruff: noqa: ANN001, ANN201, D103, N803 - Triton compiles the kernel and reads its signature
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
# The interpreter multiplies the bits of bfloat16: there everything is widened first.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Tiles(NamedTuple):
    """Queries of a program, prefix columns of a step, and how it is compiled."""

    queries: int
    columns: int
    num_warps: int
    num_stages: int


@triton.jit
def sibling_attention_kernel(
    query,
    prefix_keys,
    prefix_values,
    own_keys,
    own_values,
    lengths,
    out,
    GROUP,
    SIBLINGS,
    KV_HEADS,
    T,
    scale,
    query_row,
    query_head,
    query_sibling,
    keys_row,
    keys_head,
    keys_column,
    values_row,
    values_head,
    values_column,
    own_keys_row,
    own_keys_head,
    own_keys_sibling,
    own_values_row,
    own_values_head,
    own_values_sibling,
    QUERIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    kv_head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    places = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    live = (places < GROUP * SIBLINGS)[:, None]
    head = kv_head * GROUP + places // SIBLINGS
    sibling = (places % SIBLINGS).to(tl.int64)
    dims = tl.arange(0, DIM)[None, :]
    used = dims < D
    q = tl.load(
        query + row * query_row + (head * query_head + sibling * query_sibling)[:, None] + dims,
        mask=live & used,
        other=0.0,
    )
    own_key = tl.load(
        own_keys
        + row * own_keys_row
        + kv_head * own_keys_head
        + sibling[:, None] * own_keys_sibling
        + dims,
        mask=live & used,
        other=0.0,
    )
    own_value = tl.load(
        own_values
        + row * own_values_row
        + kv_head * own_values_head
        + sibling[:, None] * own_values_sibling
        + dims,
        mask=live & used,
        other=0.0,
    )
    # The sibling itself comes first: the running softmax never starts from nothing, not even over an empty prefix.
    peak = tl.sum(q.to(tl.float32) * own_key.to(tl.float32), axis=1) * scale
    total = tl.full((QUERIES,), 1.0, dtype=tl.float32)
    attended = own_value.to(tl.float32)
    if UPCAST:
        q = q.to(tl.float32)
    for start in range(T - tl.load(lengths + row).to(tl.int32), T, COLUMNS):
        columns = (start + tl.arange(0, COLUMNS)).to(tl.int64)[:, None]
        inside = (columns < T) & used
        k = tl.load(
            prefix_keys + row * keys_row + kv_head * keys_head + columns * keys_column + dims,
            mask=inside,
            other=0.0,
        )
        v = tl.load(
            prefix_values
            + row * values_row
            + kv_head * values_head
            + columns * values_column
            + dims,
            mask=inside,
            other=0.0,
        )
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(start + tl.arange(0, COLUMNS)[None, :] < T, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        fade = tl.exp2(peak - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * fade + tl.sum(weights, axis=1)
        attended = tl.dot(weights.to(v.dtype), v, attended * fade[:, None], input_precision="ieee")
        peak = higher
    at = out + ((row * KV_HEADS + kv_head) * GROUP * SIBLINGS + places)[:, None] * D + dims
    tl.store(at, (attended / total[:, None]).to(out.dtype.element_ty), mask=live & used)


def sibling_attention(
    query: torch.Tensor,
    prefix_keys: torch.Tensor,
    prefix_values: torch.Tensor,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """See `infer_align_kernels.sibling_attention`."""
    rows, heads, siblings, dim = query.shape
    kv_heads, columns = prefix_keys.shape[1:3]
    tensors = (query, prefix_keys, prefix_values, own_keys, own_values)
    if any(t.numel() and t.stride(-1) != 1 for t in tensors):
        raise ValueError(
            "query, keys, values: the numbers of a head lie apart in memory; the last dimension must be contiguous."
        )
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    stacked = heads // kv_heads * siblings
    shape = tiles(stacked, dim, query.dtype)
    sibling_attention_kernel[rows * kv_heads, triton.cdiv(stacked, shape.queries)](
        *tensors,
        lengths.contiguous(),
        out,
        heads // kv_heads,
        siblings,
        kv_heads,
        columns,
        scale * LOG2_E,
        *(stride for t in tensors for stride in t.stride()[:3]),
        QUERIES=shape.queries,
        COLUMNS=shape.columns,
        D=dim,
        DIM=max(16, triton.next_power_of_2(dim)),
        UPCAST=INTERPRETED,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    return out


def tiles(stacked: int, dim: int, dtype: torch.dtype) -> Tiles:
    """By the queries of one key head, the head's size and type; never by the number of rows."""
    if dtype == torch.float32:
        return Tiles(queries=16, columns=16, num_warps=4, num_stages=2)
    if dim > 128:
        return Tiles(queries=64, columns=32, num_warps=8, num_stages=2)
    if stacked > 32:
        return Tiles(queries=64, columns=32, num_warps=4, num_stages=3)
    return Tiles(queries=16 if stacked <= 16 else 32, columns=64, num_warps=4, num_stages=3)
