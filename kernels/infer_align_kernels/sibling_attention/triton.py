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
from infer_align_kernels.sibling_attention.attending import attend, find_head
from infer_align_kernels.sibling_attention.prefixes import PrefixTable

LOG2_E = 1.4426950408889634
# Columns of the shortest part of a prefix, and queries that a program merges.
MIN_PART = 256
MERGED = 16


class AttentionTiles(NamedTuple):
    """The tile sizes of the kernel and its compiler options.

    Attributes:
        queries: stacked queries per program.
        columns: prefix columns per step.
        num_warps: warps per program.
        num_stages: stages of the software pipeline.
        part: prefix columns per program.
    """

    queries: int
    columns: int
    num_warps: int
    num_stages: int
    part: int


@triton.jit
def sibling_attention_kernel(
    query,
    prefix_keys,
    prefix_values,
    own_keys,
    own_values,
    lengths,
    out,
    peaks,
    totals,
    parts,
    PLACES,
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
    PART: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
    BY_TABLE: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Compute QUERIES stacked queries of one row, key head and part of the prefix.

    Grid: (rows * key heads, blocks, parts). A stacked query is a pair of a query head in the group
    of the key head, and a sibling. With IS_SPLIT, the unfinished sums of each part are stored.
    With BY_TABLE, the prefix is given by its entries in the table of `prefixes.py`.
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
    # Where the prefix is split, the sibling belongs to the first part.
    is_first = tl.program_id(2) == 0
    own_score = tl.sum(q.to(tl.float32) * own_key.to(tl.float32), axis=1) * scale
    peak = tl.where(is_first, own_score, float("-inf"))
    total = tl.where(is_first, tl.full((QUERIES,), 1.0, dtype=tl.float32), 0.0)
    attended = tl.where(is_first, own_value.to(tl.float32), 0.0)
    if UPCAST:
        q = q.to(tl.float32)
    # In a table, the strides follow both addresses.
    keys, keys_column = find_head(
        prefix_keys,
        prefix_keys + 2,
        keys_row,
        keys_head,
        keys_column,
        row,
        kv_head,
        own_keys,
        D,
        BY_TABLE,
        UNIT,
        ALIGNED,
    )
    values, values_column = find_head(
        prefix_values,
        prefix_values + 1,
        values_row,
        values_head,
        values_column,
        row,
        kv_head,
        own_values,
        D,
        BY_TABLE,
        UNIT,
        ALIGNED,
    )
    last = tl.load(prefix_keys + 4).to(tl.int32) if BY_TABLE else T
    first = last - tl.load(lengths + row).to(tl.int32) + tl.program_id(2) * PART
    # A part after the end of the row is empty.
    end = tl.minimum(first + PART, last)
    for start in range(first, end, COLUMNS):
        peak, total, attended = attend(
            q,
            keys,
            values,
            start,
            end,
            keys_column,
            values_column,
            peak,
            total,
            attended,
            scale,
            COLUMNS,
            D,
            DIM,
            UPCAST,
        )
    first_query = (row * KV_HEADS + kv_head) * GROUP * SIBLINGS
    place = first_query + stacked
    if IS_SPLIT:
        place += tl.program_id(2).to(tl.int64) * PLACES
        in_block = stacked < GROUP * SIBLINGS
        tl.store(peaks + place, peak, mask=in_block)
        tl.store(totals + place, total, mask=in_block)
        tl.store(parts + place[:, None] * D + dims, attended, mask=in_group & in_head)
    else:
        result = (attended / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + place[:, None] * D + dims, result, mask=in_group & in_head)


@triton.jit
def sibling_attention_merge_kernel(
    peaks,
    totals,
    parts,
    lengths,
    out,
    ROW_PLACES,
    PLACES,
    QUERIES: tl.constexpr,
    PART: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
):
    """Merge the parts of QUERIES queries of one row, in their order. Grid: (rows, blocks)."""
    row = tl.program_id(0).to(tl.int64)
    in_row = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    is_query = in_row < ROW_PLACES
    place = row * ROW_PLACES + in_row
    dims = tl.arange(0, DIM)[None, :]
    is_number = is_query[:, None] & (dims < D)
    count = tl.maximum(tl.cdiv(tl.load(lengths + row).to(tl.int32), PART), 1)
    peak = tl.load(peaks + place, mask=is_query, other=0.0)
    for part in range(1, count):
        peak = tl.maximum(peak, tl.load(peaks + part * PLACES + place, mask=is_query, other=0.0))
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    attended = tl.zeros((QUERIES, DIM), dtype=tl.float32)
    for part in range(count):
        part_place = part * PLACES + place
        rescale = tl.exp2(tl.load(peaks + part_place, mask=is_query, other=0.0) - peak)
        total += tl.load(totals + part_place, mask=is_query, other=1.0) * rescale
        numbers = tl.load(parts + part_place[:, None] * D + dims, mask=is_number, other=0.0)
        attended += numbers * rescale[:, None]
    result = (attended / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + place[:, None] * D + dims, result, mask=is_number)


class Prefix(NamedTuple):
    """The prefix of all rows as the kernel takes it.

    Attributes:
        keys: the tensor, or its entry in a table; so are the values.
        strides: of keys and values by row, head and column; 0 with a table.
        columns: number of columns; with a table, the most that a launch can read.
        table: the table; None for tensors.
    """

    keys: torch.Tensor
    values: torch.Tensor
    strides: tuple[int, ...]
    columns: int
    table: PrefixTable | None = None


def sibling_attention(
    query: torch.Tensor,
    prefix_keys: torch.Tensor,
    prefix_values: torch.Tensor,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Launch the kernels; see `infer_align_kernels.sibling_attention`."""
    _check_contiguous(query, prefix_keys, prefix_values, own_keys, own_values)
    strides = (*prefix_keys.stride()[:3], *prefix_values.stride()[:3])
    prefix = Prefix(prefix_keys, prefix_values, strides, prefix_keys.shape[2])
    return _launch(query, prefix, own_keys, own_values, lengths, scale)


def sibling_attention_at(
    query: torch.Tensor,
    prefixes: PrefixTable,
    layer: int,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    lengths: torch.Tensor,
    capacity: int,
    scale: float,
) -> torch.Tensor:
    """Launch the kernels; see `infer_align_kernels.sibling_attention_at`."""
    _check_contiguous(query, own_keys, own_values)
    entries = prefixes.entries[layer]
    prefix = Prefix(entries, entries[1:], (0,) * 6, capacity, prefixes)
    return _launch(query, prefix, own_keys, own_values, lengths, scale)


def _check_contiguous(*tensors: torch.Tensor) -> None:
    if any(t.numel() and t.stride(-1) != 1 for t in tensors):
        raise ValueError(
            "query, keys, values: the numbers of a head are not contiguous in memory; the last "
            "dimension must have stride 1."
        )


def _launch(
    query: torch.Tensor,
    prefix: Prefix,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    rows, heads, siblings, dim = query.shape
    kv_heads = own_keys.shape[1]
    table = prefix.table
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    group = heads // kv_heads
    shape = tiles(group * siblings, dim, query.dtype)
    blocks = triton.cdiv(group * siblings, shape.queries)
    parts = max(1, triton.cdiv(prefix.columns, shape.part))
    unfinished = _allocate_unfinished(parts, out)
    own_strides = (*own_keys.stride()[:3], *own_values.stride()[:3])
    places = rows * heads * siblings
    lengths = lengths.contiguous()
    padded_dim = max(16, triton.next_power_of_2(dim))
    sibling_attention_kernel[rows * kv_heads, blocks, parts](
        query,
        prefix.keys,
        prefix.values,
        own_keys,
        own_values,
        lengths,
        out,
        *unfinished,
        places,
        group,
        siblings,
        kv_heads,
        prefix.columns,
        scale * LOG2_E,
        *query.stride()[:3],
        *prefix.strides,
        *own_strides,
        QUERIES=shape.queries,
        COLUMNS=shape.columns,
        D=dim,
        DIM=padded_dim,
        PART=shape.part,
        IS_SPLIT=parts > 1,
        # The interpreter multiplies the bits of bfloat16, so numbers are widened there.
        UPCAST=INTERPRETED,
        BY_TABLE=table is not None,
        UNIT=table.stride_unit if table else 1,
        ALIGNED=table is not None and table.is_aligned,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    if parts > 1:
        sibling_attention_merge_kernel[rows, triton.cdiv(heads * siblings, MERGED)](
            *unfinished,
            lengths,
            out,
            heads * siblings,
            places,
            QUERIES=MERGED,
            PART=shape.part,
            D=dim,
            DIM=padded_dim,
            num_warps=4,
        )
    return out


def _allocate_unfinished(parts: int, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return memory for the peaks, totals and weighted sums of each part, if there are several."""
    if parts == 1:
        return (out, out, out)
    scalars = (parts, *out.shape[:-1])
    peaks, totals = torch.empty((2, *scalars), dtype=torch.float32, device=out.device)
    sums = torch.empty((parts, *out.shape), dtype=torch.float32, device=out.device)
    return (peaks, totals, sums)


def tiles(stacked: int, dim: int, dtype: torch.dtype) -> AttentionTiles:
    """Choose the tiles by the stacked queries of a key head, the head's size and its dtype.

    They do not depend on the number of rows, so a row's result is the same in every batch.
    """
    # The sums of a part are written and read once. They cost a sixth of the part's keys and values.
    part = max(MIN_PART, triton.next_power_of_2(12 * stacked))
    if dtype == torch.float32:
        return AttentionTiles(queries=16, columns=16, num_warps=4, num_stages=2, part=part)
    if dim > 128:
        return AttentionTiles(queries=64, columns=32, num_warps=8, num_stages=2, part=part)
    if stacked > 64:
        return AttentionTiles(queries=128, columns=64, num_warps=8, num_stages=3, part=part)
    queries = max(16, triton.next_power_of_2(stacked))
    return AttentionTiles(queries=queries, columns=64, num_warps=4, num_stages=3, part=part)
