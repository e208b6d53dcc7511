"""Sibling attention in torch: the definition, and the path on CPU."""

from __future__ import annotations

import torch


def sibling_attention(
    query: torch.Tensor,
    prefix_keys: torch.Tensor,
    prefix_values: torch.Tensor,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """See `infer_align_kernels.sibling_attention`, which checks what arrives here.

    The heads that share a key head stand under each other as rows of one product, so the prefix is read where it lies, once. The
    sibling itself joins by log-sum-exp: softmax over prefix and self is a mean of the two outputs, weighted by sigmoid(self - lse).
    """
    rows, heads, siblings, dim = query.shape
    kv_heads, columns = prefix_keys.shape[1:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, siblings, dim)
    stacked = grouped.flatten(2, 3)
    if not query.numel() or not columns:
        return _alone(own_values, grouped).reshape(query.shape)
    unused = torch.arange(columns, device=query.device) < (columns - lengths)[:, None]
    mask = query.new_zeros(unused.shape).masked_fill_(unused, -torch.inf)[:, None, None]
    # The public scaled_dot_product_attention does not hand out the log-sum-exp that the merge needs.
    prefix, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        stacked,
        prefix_keys,
        prefix_values,
        attn_mask=mask.expand(rows, 1, stacked.shape[2], columns),
        scale=scale,
    )
    own = (grouped.to(dtype) * own_keys.to(dtype)[:, :, None]).sum(dim=-1) * scale
    share = torch.sigmoid(own - lse.view_as(own))[..., None]
    merged = torch.lerp(
        prefix.to(dtype).view_as(grouped), own_values.to(dtype)[:, :, None], share
    ).to(query.dtype)
    return torch.where(
        (lengths == 0)[:, None, None, None, None], _alone(own_values, grouped), merged
    ).reshape(query.shape)


def _alone(own_values: torch.Tensor, grouped: torch.Tensor) -> torch.Tensor:
    """Over itself alone a sibling's weight is 1."""
    return own_values[:, :, None].expand_as(grouped)
