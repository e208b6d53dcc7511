"""Sibling attention in torch: the definition of the kernel, and the implementation on CPU."""

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
    """Compute sibling attention; see `infer_align_kernels.sibling_attention`, which checks shapes.

    Query heads that share a key head are stacked as rows of one product, so the prefix is read once
    and is not copied. The sibling itself is merged by log-sum-exp: the softmax over prefix and self
    is a mean of the two outputs, and the weight of the sibling's own value is sigmoid(self - lse).
    """
    rows, heads, siblings, dim = query.shape
    kv_heads, columns = prefix_keys.shape[1:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, siblings, dim)
    stacked = grouped.flatten(2, 3)
    # With an empty prefix, the weight of the sibling itself is 1.
    own_output = own_values[:, :, None].expand_as(grouped)
    if not query.numel() or not columns:
        return own_output.reshape(query.shape)
    is_unused = torch.arange(columns, device=query.device) < (columns - lengths)[:, None]
    mask = query.new_zeros(is_unused.shape).masked_fill_(is_unused, -torch.inf)
    # The public scaled_dot_product_attention does not return the log-sum-exp that the merge needs.
    prefix_output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        stacked,
        prefix_keys,
        prefix_values,
        attn_mask=mask[:, None, None].expand(rows, 1, stacked.shape[2], columns),
        scale=scale,
    )
    products = grouped.to(dtype) * own_keys.to(dtype)[:, :, None]
    own_scores = products.sum(dim=-1) * scale
    own_weight = torch.sigmoid(own_scores - lse.view_as(own_scores))[..., None]
    prefix_output = prefix_output.to(dtype).view_as(grouped)
    merged = torch.lerp(prefix_output, own_values.to(dtype)[:, :, None], own_weight)
    is_empty = (lengths == 0)[:, None, None, None, None]
    return torch.where(is_empty, own_output, merged.to(query.dtype)).reshape(query.shape)
