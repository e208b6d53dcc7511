"""Parts of the kernel of sibling attention: where a prefix is, and a step along it."""

# Triton compiles the functions and reads their signatures.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_head(
    tensor,
    strides,
    row_stride,
    head_stride,
    column_stride,
    row,
    head,
    like,
    D: tl.constexpr,
    BY_TABLE: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Return where the columns of a head of a row begin, and their stride.

    With BY_TABLE, `tensor` is the address in a table of `prefixes.py`, `strides` its strides, and
    `like` has the type of the tensor.
    """
    if BY_TABLE:
        start = tl.load(tensor).to(tl.pointer_type(like.dtype.element_ty))
        if ALIGNED:
            start = tl.multiple_of(start, 16)
        row_stride = tl.multiple_of(tl.load(strides), UNIT)
        head_stride = tl.multiple_of(tl.load(strides + 1), UNIT)
        column_stride = D
    else:
        start = tensor
    return start + row * row_stride + head * head_stride, column_stride


@triton.jit
def attend(
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
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add the columns from `start` to `end`, at most COLUMNS, to the running softmax."""
    dims = tl.arange(0, DIM)[None, :]
    columns = start + tl.arange(0, COLUMNS)
    # Columns after the end are read from the last one, which needs no mask, and get no weight.
    places = tl.minimum(columns, end - 1).to(tl.int64)[:, None]
    if D == DIM:
        k = tl.load(keys + places * keys_column + dims)
        v = tl.load(values + places * values_column + dims)
    else:
        k = tl.load(keys + places * keys_column + dims, mask=dims < D, other=0.0)
        v = tl.load(values + places * values_column + dims, mask=dims < D, other=0.0)
    if UPCAST:
        k, v = k.to(tl.float32), v.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = tl.where(columns[None, :] < end, scores, float("-inf"))
    # The scale is positive. So it is applied to the peak, and to the exponents in one instruction
    # with the difference.
    new_peak = tl.maximum(peak, tl.max(scores, axis=1) * scale)
    rescale = tl.exp2(peak - new_peak)
    weights = tl.exp2(scores * scale - new_peak[:, None])
    total = total * rescale + tl.sum(weights, axis=1)
    attended *= rescale[:, None]
    attended = tl.dot(weights.to(v.dtype), v, attended, input_precision="ieee")
    return new_peak, total, attended
