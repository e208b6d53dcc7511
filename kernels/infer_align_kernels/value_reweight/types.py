"""What goes into value reweighting and what comes out. B rows, V vocabulary, M values, k candidates, r rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Tail = Literal["keep", "mask"]


@dataclass(frozen=True, slots=True)
class HeadValues:
    """A low-rank value head: every token has a value, `hidden[b, m] . weight[m, token] + bias[m, token]`.

    No centring: a constant added to all values of a row cancels in the softmax.
    """

    hidden: torch.Tensor  # [B, M, r]
    weight: torch.Tensor  # [M, V, r]
    bias: torch.Tensor | None = None  # [M, V]


@dataclass(frozen=True, slots=True)
class CandidateValues:
    """Values of k candidates a row; the other tokens keep their logits, or are dropped.

    A row with fewer candidates fills its last slots with token id -1. A row's ids differ from each other.
    """

    token_ids: torch.Tensor  # [B, k] int64
    values: torch.Tensor  # [M, B, k]
    tail: Tail | torch.Tensor = "keep"  # or [B] bool, True where the other tokens are dropped


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token per row, [B] each; a row in which no token has a finite logit gives token -1 and -inf."""

    token: torch.Tensor  # int64
    logsumexp: torch.Tensor  # of the steered logits over temperature, float32
    logprob: torch.Tensor  # of the token, as it was sampled: steered, temperature applied
    frozen_logprob: (
        torch.Tensor
    )  # the same with beta 0: what the frozen model would have given the token
