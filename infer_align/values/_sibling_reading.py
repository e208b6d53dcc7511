"""Attention of a value LM that reads sibling candidates with the kernel `sibling_attention`.

transformers finds an attention by its name. This one is `sdpa`, except while siblings are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from infer_align_kernels import PrefixTable, sibling_attention_at

NAME = "infer_align_siblings"


class OwnColumns(Cache):  # type: ignore[misc]
    """The cache of a forward pass of siblings: it holds their own keys and values alone.

    Attributes:
        columns: [layers, 2, B, Hkv, k, D] keys and values, which each pass writes again.
        layer: the layer that has given its keys and values last.
    """

    def __init__(self, columns: torch.Tensor) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.columns = columns
        self.layer = 0

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the keys and values of one layer; return them. A model calls it."""
        self.layer = layer_idx
        keys, values = self.columns[layer_idx]
        return keys.copy_(key_states), values.copy_(value_states)

    def get_seq_length(self, _: int = 0) -> int:
        """Return 0: a model is told the positions, and the prefixes are elsewhere."""
        return 0


class SiblingReading(NamedTuple):
    """A pass of siblings, as its attention needs it beside queries, keys and values.

    Attributes:
        cache: that of the pass.
        prefixes: points to the keys and values of the tokens before the siblings.
        lengths: [B] the number of these tokens.
        capacity: see `sibling_attention_at`.
    """

    cache: OwnColumns
    prefixes: PrefixTable
    lengths: torch.Tensor
    capacity: int


# What is read in this thread; None while no siblings are read.
_reading: ContextVar[SiblingReading | None] = ContextVar("reading", default=None)


@contextmanager
def reading_siblings(reading: SiblingReading) -> Iterator[None]:
    """Let the queries of a forward pass be siblings: alternatives for one position."""
    token = _reading.set(reading)
    try:
        yield
    finally:
        _reading.reset(token)


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

    The last columns are those of the queries. Siblings have no other columns here.

    Returns:
        [B, Q, H, D], and no weights.
    """
    reading = _reading.get()
    if reading is None:
        attended: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return attended
    layer, lengths, capacity = reading.cache.layer, reading.lengths, reading.capacity
    result = sibling_attention_at(
        query, reading.prefixes, layer, key, value, lengths, capacity, scaling
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
