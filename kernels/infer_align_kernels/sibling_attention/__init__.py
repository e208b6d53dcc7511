"""Sibling attention for a lookahead value LM: k sibling tokens per row attend to a shared prefix.

Shapes: B rows, H query heads, Hkv key heads, k siblings, T columns, D numbers per head.
"""

from __future__ import annotations

import torch

from infer_align_kernels.devices import launching, runs_triton
from infer_align_kernels.sibling_attention import reference
from infer_align_kernels.sibling_attention.prefixes import PrefixTable

__all__ = ["PrefixTable", "sibling_attention", "sibling_attention_at"]


def sibling_attention(
    query: torch.Tensor,
    prefix_keys: torch.Tensor,
    prefix_values: torch.Tensor,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    lengths: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Let each sibling attend to its row's prefix and to itself, but not to the other siblings.

    The siblings are k alternatives for one position, so there is no causal mask among them. The
    prefix is not copied. The key heads may be fewer than the query heads: query head h reads key
    head h // (H / Hkv).

    Args:
        query: [B, H, k, D].
        prefix_keys: [B, Hkv, T, D], right-aligned: row b's prefix is its last `lengths[b]` columns.
            Use a shorter length for a sliding window; all siblings have the same position.
        prefix_values: [B, Hkv, T, D]. Unused columns must hold finite numbers.
        own_keys: [B, Hkv, k, D], the key of each sibling.
        own_values: [B, Hkv, k, D], the value of each sibling.
        lengths: [B] integers in 0..T. A row of length 0 attends to itself only.
        scale: positive factor of the scores; None means 1 / sqrt(D).

    Returns:
        [B, H, k, D], in the query's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the scale is not positive.
    """
    _check_shapes(query, prefix_keys, prefix_values, own_keys, own_values, lengths)
    factor = _factor(query, scale)
    if runs_triton(query.device):
        # Triton is not needed on a CPU.
        from infer_align_kernels.sibling_attention import triton  # noqa: PLC0415

        with launching(query.device):
            return triton.sibling_attention(
                query, prefix_keys, prefix_values, own_keys, own_values, lengths, factor
            )
    return reference.sibling_attention(
        query, prefix_keys, prefix_values, own_keys, own_values, lengths, factor
    )


def sibling_attention_at(
    query: torch.Tensor,
    prefixes: PrefixTable,
    layer: int,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    lengths: torch.Tensor,
    capacity: int,
    scale: float | None = None,
) -> torch.Tensor:
    """Do as `sibling_attention` does, with the prefix that a table points to.

    In a CUDA graph, a replay reads the prefix that the table points to then. The first rows of the
    query have a prefix. Rows after those of the prefix are padding: their length must be 0.

    Args:
        query: [B, H, k, D].
        prefixes: points to the keys and values of all layers.
        layer: index of the layer.
        own_keys: [B, Hkv, k, D], the key of each sibling.
        own_values: [B, Hkv, k, D], the value of each sibling.
        lengths: [B] integers in 0..T.
        capacity: the most columns that the table will point to in a replay of this call.
        scale: positive factor of the scores; None means 1 / sqrt(D).

    Returns:
        [B, H, k, D], in the query's dtype. A row has the bits that `sibling_attention` gives.

    Raises:
        ValueError: a shape, dtype or device does not fit, the prefix has more columns, or the scale
            is not positive.
    """
    _check_own(query, own_keys, own_values, lengths)
    if query.dtype != prefixes.dtype or query.shape[-1] != prefixes.dim:
        raise ValueError(
            f"query: heads of {query.shape[-1]} {query.dtype} do not fit the table; must be of "
            f"{prefixes.dim} {prefixes.dtype}."
        )
    keys, values = prefixes.keys[layer], prefixes.values[layer]
    if keys.shape[2] > capacity:
        raise ValueError(f"capacity: {capacity} is below the {keys.shape[2]} columns in the table.")
    factor = _factor(query, scale)
    if runs_triton(query.device):
        # Triton is not needed on a CPU.
        from infer_align_kernels.sibling_attention import triton  # noqa: PLC0415

        with launching(query.device):
            return triton.sibling_attention_at(
                query, prefixes, layer, own_keys, own_values, lengths, capacity, factor
            )
    rows = len(keys)
    attended = reference.sibling_attention(
        query[:rows], keys, values, own_keys[:rows], own_values[:rows], lengths[:rows], factor
    )
    # Padding attends to itself.
    group = query.shape[1] // own_keys.shape[1]
    return torch.cat([attended, own_values[rows:].repeat_interleave(group, dim=1)])


def _factor(query: torch.Tensor, scale: float | None) -> float:
    factor: float = query.shape[-1] ** -0.5 if scale is None else scale
    if not factor > 0:
        raise ValueError(f"scale: {factor} is not allowed; must be over 0.")
    return factor


def _check_own(
    query: torch.Tensor, own_keys: torch.Tensor, own_values: torch.Tensor, lengths: torch.Tensor
) -> None:
    if query.ndim != 4 or own_keys.ndim != 4:
        raise ValueError(
            f"query and own_keys: {query.ndim} and {own_keys.ndim} dimensions are not allowed; "
            "must be [B, heads, siblings, D]."
        )
    rows, heads, siblings, dim = query.shape
    kv_heads = own_keys.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"query: {heads} heads over {kv_heads} key heads is not allowed; must be a multiple."
        )
    own_shape = (rows, kv_heads, siblings, dim)
    _check_tensor("own_keys", own_keys, own_shape, query)
    _check_tensor("own_values", own_values, own_shape, query)
    _check_shape_and_device("lengths", lengths, (rows,), query)
    if lengths.is_floating_point():
        raise ValueError(f"lengths: {lengths.dtype} is not allowed; must be an integer type.")


def _check_shapes(
    query: torch.Tensor,
    prefix_keys: torch.Tensor,
    prefix_values: torch.Tensor,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    if query.ndim != 4 or prefix_keys.ndim != 4:
        raise ValueError(
            f"query and prefix_keys: {query.ndim} and {prefix_keys.ndim} dimensions are not "
            "allowed; must be [B, heads, tokens, D]."
        )
    _check_own(query, own_keys, own_values, lengths)
    rows, _, _, dim = query.shape
    prefix_shape = (rows, own_keys.shape[1], prefix_keys.shape[2], dim)
    _check_tensor("prefix_keys", prefix_keys, prefix_shape, query)
    _check_tensor("prefix_values", prefix_values, prefix_shape, query)


def _check_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], query: torch.Tensor
) -> None:
    _check_shape_and_device(name, tensor, shape, query)
    if tensor.dtype != query.dtype:
        raise ValueError(f"{name}: {tensor.dtype} is not allowed; must be {query.dtype}, as query.")


def _check_shape_and_device(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], query: torch.Tensor
) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name}: shape {tuple(tensor.shape)} does not fit query {tuple(query.shape)}; "
            f"must be {shape}."
        )
    if tensor.device != query.device:
        raise ValueError(f"{name}: on {tensor.device}; must be on {query.device}, as query.")
