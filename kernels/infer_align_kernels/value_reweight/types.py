"""Inputs and outputs of value reweighting.

Shapes: B rows, V vocabulary, M values, k candidates, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Tail = Literal["keep", "mask"]


@dataclass(frozen=True, slots=True)
class HeadValues:
    """A low-rank value head: Q(b, m, token) = hidden[b, m] . weight[m, token] + bias[m, token].

    The values are not centred: a constant added to all values of a row cancels in the softmax.

    Attributes:
        hidden: [B, M, r].
        weight: [M, V, r].
        bias: [M, V], or None.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class CandidateValues:
    """Values of k candidate tokens per row.

    Attributes:
        token_ids: [B, k] int64, different in each row. A row with fewer candidates holds -1 in its
            last slots.
        values: [M, B, k].
        tail: "keep" leaves the logits of all other tokens, "mask" sets them to -inf. A [B] bool
            tensor masks the tail of the rows that are True.
    """

    token_ids: torch.Tensor
    values: torch.Tensor
    tail: Tail | torch.Tensor = "keep"


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sampled token per row. A row without a finite logit has token -1 and -inf elsewhere.

    Attributes:
        token: [B] int64.
        logsumexp: [B] float32, of the steered logits divided by the temperature.
        logprob: [B] float32, of the token under the distribution that it was sampled from.
        frozen_logprob: [B] float32, of the token at beta 0 and the same temperature.
    """

    token: torch.Tensor
    logsumexp: torch.Tensor
    logprob: torch.Tensor
    frozen_logprob: torch.Tensor
