"""Attention of a value LM that reads sibling candidates with the kernel `sibling_attention`.

transformers finds an attention by its name. This one is `sdpa`, except while siblings are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from infer_align_kernels import sibling_attention

NAME = "infer_align_siblings"
# The tokens of each row before its siblings, [B]; None while no siblings are read.
_prefix_lengths: ContextVar[torch.Tensor | None] = ContextVar("prefix_lengths", default=None)


@contextmanager
def reading_siblings(lengths: torch.Tensor) -> Iterator[None]:
    """Let the queries of a forward pass be siblings: alternatives for one position.

    Args:
        lengths: [B] the tokens of each row before them, which end in the last cached column.
    """
    token = _prefix_lengths.set(lengths)
    try:
        yield
    finally:
        _prefix_lengths.reset(token)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as `sdpa` does, or as siblings: [B, H, Q, D] queries, [B, Hkv, columns, D] keys.

    The last columns are those of the queries.

    Returns:
        [B, Q, H, D], and no weights.
    """
    lengths = _prefix_lengths.get()
    if lengths is None:
        attended: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return attended
    first = key.shape[2] - query.shape[2]
    result = sibling_attention(
        query,
        key[:, :, :first],
        value[:, :, :first],
        key[:, :, first:],
        value[:, :, first:],
        lengths,
        scaling,
    )
    return result.transpose(1, 2).contiguous(), None


def supports_siblings(lm: Any) -> bool:
    """Return True if a transformers model can use this attention instead of its own.

    It needs transformers' interface of attentions, and scores without a cap.
    """
    has_interface = getattr(lm, "_supports_attention_backend", False)
    has_cap = getattr(lm.config, "attn_logit_softcapping", None) is not None
    return bool(has_interface and getattr(lm, "_supports_sdpa", False) and not has_cap)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
