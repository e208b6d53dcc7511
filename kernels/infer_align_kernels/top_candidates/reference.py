"""Top-k in torch: the definition of the kernel, and the implementation on CPU."""

from __future__ import annotations

import torch

# Number of keys that `top_candidates_by_key` makes at once, 16 bytes each.
KEYS_AT_ONCE = 2**23
# Ids are below this number, which fills the lower half of a key.
LARGEST_ID = 0xFFFFFFFF


def top_candidates(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Select the k largest logits with `topk`; see `infer_align_kernels.top_candidates`."""
    values, ids = logits.topk(min(k + 1, logits.shape[1]), dim=1)
    # The comparison is False for equal logits and for NaN.
    is_decreasing = bool((values[:, 1:] < values[:, :-1]).all())
    if is_decreasing and values.shape[1] > 1:
        return ids[:, :k]
    if bool(values[:, 0].isnan().any()):
        return top_candidates(logits.masked_fill(logits.isnan(), -torch.inf), k)
    # Select and order the equal logits here, because topk leaves both open.
    has_equal = (values[:, 1:] == values[:, :-1]).any(dim=1)
    for row in has_equal.nonzero()[:, 0].tolist():
        row_logits = logits[row]
        smallest = values[row, k - 1]
        larger = (row_logits > smallest).nonzero()[:, 0]
        equal = (row_logits == smallest).nonzero()[:, 0]
        selected = torch.cat([larger, equal[: k - len(larger)]])
        order = row_logits[selected].sort(descending=True, stable=True).indices
        ids[row, :k] = selected[order]
    return ids[:, :k]


def top_candidates_by_key(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Select the k largest logits without reading numbers back from the device.

    Each token gets a 64-bit key: the upper half orders by logit, the lower half by descending id.
    All keys of a row are different, so `topk` leaves nothing open. The rows are processed in
    groups, which limits the memory and does not change the result.
    """
    vocabulary = logits.shape[1]
    rows = max(1, KEYS_AT_ONCE // vocabulary)
    descending_ids = LARGEST_ID - torch.arange(vocabulary, device=logits.device)
    selected = []
    for start in range(0, len(logits), rows):
        group = logits[start : start + rows].float()
        clean = group.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        # Adding 0 turns -0 into 0.
        keys = clean.add_(0.0).view(torch.int32).long()
        # The bits of negative floats are in reverse order as integers.
        keys ^= (keys >> 63) & 0x7FFFFFFF
        keys = (keys << 32).bitwise_or_(descending_ids)
        selected.append(keys.topk(k, dim=1).indices)
    if not selected:
        return logits.new_empty((0, k), dtype=torch.int64)
    return torch.cat(selected)
