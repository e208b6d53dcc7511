"""Sibling attention in Triton.

One pass over a row's prefix serves all siblings and all query heads that share a key head.
"""

# Triton compiles the kernel and reads its signature.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from infer_align_kernels.devices import INTERPRETED

LOG2_E = 1.4426950408889634


class AttentionTiles(NamedTuple):
    """The tile sizes of the kernel and its compiler options.

    Attributes:
        queries: stacked queries per program.
        columns: prefix columns per step.
        num_warps: warps per program.
        num_stages: stages of the software pipeline.
    """

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
    """Compute QUERIES stacked queries of one row and key head. Grid: (rows * key heads, blocks).

    A stacked query is a pair of a query head in the group of the key head, and a sibling.
    """
    row = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    kv_head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    stacked = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    in_group = (stacked < GROUP * SIBLINGS)[:, None]
    head = kv_head * GROUP + stacked // SIBLINGS
    sibling = (stacked % SIBLINGS).to(tl.int64)
    dims = tl.arange(0, DIM)[None, :]
    in_head = dims < D
    q = tl.load(
        query + row * query_row + (head * query_head + sibling * query_sibling)[:, None] + dims,
        mask=in_group & in_head,
        other=0.0,
    )
    own_key = tl.load(
        own_keys
        + row * own_keys_row
        + kv_head * own_keys_head
        + sibling[:, None] * own_keys_sibling
        + dims,
        mask=in_group & in_head,
        other=0.0,
    )
    own_value = tl.load(
        own_values
        + row * own_values_row
        + kv_head * own_values_head
        + sibling[:, None] * own_values_sibling
        + dims,
        mask=in_group & in_head,
        other=0.0,
    )
    # The running softmax starts with the sibling itself, so it is defined for an empty prefix too.
    peak = tl.sum(q.to(tl.float32) * own_key.to(tl.float32), axis=1) * scale
    total = tl.full((QUERIES,), 1.0, dtype=tl.float32)
    attended = own_value.to(tl.float32)
    if UPCAST:
        q = q.to(tl.float32)
    for start in range(T - tl.load(lengths + row).to(tl.int32), T, COLUMNS):
        columns = (start + tl.arange(0, COLUMNS)).to(tl.int64)[:, None]
        in_prefix = (columns < T) & in_head
        k = tl.load(
            prefix_keys + row * keys_row + kv_head * keys_head + columns * keys_column + dims,
            mask=in_prefix,
            other=0.0,
        )
        v = tl.load(
            prefix_values
            + row * values_row
            + kv_head * values_head
            + columns * values_column
            + dims,
            mask=in_prefix,
            other=0.0,
        )
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(start + tl.arange(0, COLUMNS)[None, :] < T, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        rescale = tl.exp2(peak - new_peak)
        weights = tl.exp2(scores - new_peak[:, None])
        total = total * rescale + tl.sum(weights, axis=1)
        attended *= rescale[:, None]
        attended = tl.dot(weights.to(v.dtype), v, attended, input_precision="ieee")
        peak = new_peak
    first_query = (row * KV_HEADS + kv_head) * GROUP * SIBLINGS
    pointers = out + (first_query + stacked)[:, None] * D + dims
    result = (attended / total[:, None]).to(out.dtype.element_ty)
    tl.store(pointers, result, mask=in_group & in_head)


def sibling_attention(
    query: torch.Tensor,
    prefix_keys: torch.Tensor,
    prefix_values: torch.Tensor,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Launch the kernel; see `infer_align_kernels.sibling_attention`."""
    rows, heads, siblings, dim = query.shape
    kv_heads, columns = prefix_keys.shape[1:3]
    tensors = (query, prefix_keys, prefix_values, own_keys, own_values)
    if any(t.numel() and t.stride(-1) != 1 for t in tensors):
        raise ValueError(
            "query, keys, values: the numbers of a head are not contiguous in memory; the last "
            "dimension must have stride 1."
        )
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    group = heads // kv_heads
    shape = tiles(group * siblings, dim, query.dtype)
    blocks = triton.cdiv(group * siblings, shape.queries)
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    sibling_attention_kernel[rows * kv_heads, blocks](
        *tensors,
        lengths.contiguous(),
        out,
        group,
        siblings,
        kv_heads,
        columns,
        scale * LOG2_E,
        *strides,
        QUERIES=shape.queries,
        COLUMNS=shape.columns,
        D=dim,
        DIM=max(16, triton.next_power_of_2(dim)),
        # The interpreter multiplies the bits of bfloat16, so numbers are widened there.
        UPCAST=INTERPRETED,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    return out


def tiles(stacked: int, dim: int, dtype: torch.dtype) -> AttentionTiles:
    """Choose the tiles by the stacked queries of a key head, the head's size and its dtype.

    They do not depend on the number of rows, so a row's result is the same in every batch.
    """
    if dtype == torch.float32:
        return AttentionTiles(queries=16, columns=16, num_warps=4, num_stages=2)
    if dim > 128:
        return AttentionTiles(queries=64, columns=32, num_warps=8, num_stages=2)
    if stacked > 32:
        return AttentionTiles(queries=64, columns=32, num_warps=4, num_stages=3)
    queries = 16 if stacked <= 16 else 32
    return AttentionTiles(queries=queries, columns=64, num_warps=4, num_stages=3)
