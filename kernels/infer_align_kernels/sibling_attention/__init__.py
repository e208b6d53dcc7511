"""Attention for a lookahead value LM: k sibling tokens per row over one shared prefix, and each over itself."""

from __future__ import annotations

import torch

from infer_align_kernels.sibling_attention import reference


def sibling_attention(
    query: torch.Tensor,
    prefix_keys: torch.Tensor,
    prefix_values: torch.Tensor,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    lengths: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Each sibling attends to its row's prefix and to itself, never to another sibling. -> [B, H, k, D], the query's dtype.

    The siblings are k alternatives for one position: no order among them, so no causal mask. The prefix is read where it lies; its
    heads may be fewer than the query's (grouped queries: query head h reads key head h // (H / Hkv)).

    Args:
        query: [B, H, k, D].
        prefix_keys: [B, Hkv, T, D], right-aligned: row b's prefix is its last `lengths[b]` columns. A sliding window is a shorter
            length, since all siblings stand at the same position.
        prefix_values: [B, Hkv, T, D]; unused columns must hold finite numbers.
        own_keys: [B, Hkv, k, D], each sibling's own key.
        own_values: [B, Hkv, k, D].
        lengths: [B] integers in 0..T; a row of length 0 attends to itself alone.
        scale: multiplies the scores; 1 / sqrt(D) unless given.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, by name.
    """
    _check(query, prefix_keys, prefix_values, own_keys, own_values, lengths)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.is_cuda:
        from infer_align_kernels.sibling_attention import triton  # noqa: PLC0415 - not needed on CPU

        with torch.cuda.device(query.device):
            return triton.sibling_attention(
                query, prefix_keys, prefix_values, own_keys, own_values, lengths, scale
            )
    return reference.sibling_attention(
        query, prefix_keys, prefix_values, own_keys, own_values, lengths, scale
    )


def _check(
    query: torch.Tensor,
    prefix_keys: torch.Tensor,
    prefix_values: torch.Tensor,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    if query.ndim != 4 or prefix_keys.ndim != 4:
        raise ValueError(
            f"query and prefix_keys: {query.ndim} and {prefix_keys.ndim} dimensions; must be [B, heads, tokens, D]."
        )
    rows, heads, siblings, dim = query.shape
    kv_heads, columns = prefix_keys.shape[1:3]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query: {heads} heads over {kv_heads} key heads; must be a multiple.")
    expected = {
        "prefix_keys": (prefix_keys, (rows, kv_heads, columns, dim)),
        "prefix_values": (prefix_values, (rows, kv_heads, columns, dim)),
        "own_keys": (own_keys, (rows, kv_heads, siblings, dim)),
        "own_values": (own_values, (rows, kv_heads, siblings, dim)),
        "lengths": (lengths, (rows,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}: shape {tuple(tensor.shape)} does not fit query {tuple(query.shape)}; must be {shape}."
            )
        if tensor.device != query.device:
            raise ValueError(f"{name}: on {tensor.device}, but query is on {query.device}.")
        if name != "lengths" and tensor.dtype != query.dtype:
            raise ValueError(f"{name}: {tensor.dtype}, but query is {query.dtype}.")
    if lengths.is_floating_point():
        raise ValueError(f"lengths: {lengths.dtype}; must be integers.")
