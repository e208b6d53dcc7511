"""Where logits become tokens: each row by its own parameters, its own seed, and nothing else in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from infer_align.decoding.params import SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Sampled(Protocol):
    """What the sampler reads of a row."""

    seed: int
    tokens: list[int]

    @property
    def params(self) -> SamplingParams:
        """How it is sampled."""

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's tokens."""

    @property
    def banned(self) -> frozenset[int]:
        """End-of-sequence tokens that may not come yet."""


def sample(logits: torch.Tensor, rows: Sequence[Sampled]) -> list[int]:
    """One token per row. [B, V] float32, adjusted and steered -> B ids.

    Temperature, then min_p, top_k and top_p over what is left. One uniform number a row, from its seed and its position alone,
    picks by inverse CDF. Temperature 0 takes the largest, of equal ones the lowest id.
    """
    temperature = torch.tensor([row.params.temperature for row in rows], device=logits.device)
    greedy = logits.argmax(dim=-1)
    if not bool((temperature > 0).any()):
        return greedy.tolist()
    scaled = _truncated(logits / temperature.clamp(min=1e-6)[:, None], rows)
    cdf = torch.softmax(scaled, dim=-1, dtype=torch.float64).cumsum(dim=-1)
    uniform = torch.from_numpy(
        uniforms([row.seed for row in rows], [len(row.tokens) for row in rows])
    ).to(logits.device)
    picked = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(
        max=logits.shape[-1] - 1
    )
    return torch.where(temperature > 0, picked, greedy).tolist()


def uniforms(
    seeds: Sequence[int], steps: Sequence[int]
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Numbers in [0, 1), each from its (seed, step) alone: two rounds of splitmix64. [B], [B] -> [B]."""
    with np.errstate(over="ignore"):
        state = (
            _mix(np.array(seeds, dtype=np.uint64) + _GOLDEN)
            + np.array(steps, dtype=np.uint64) * _GOLDEN
        )
        return (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(
    z: np.ndarray[tuple[int], np.dtype[np.uint64]],
) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def adjust(logits: torch.Tensor, rows: Sequence[Sampled]) -> torch.Tensor:
    """Biases, penalties and bans, for the rows that have any: what comes before steering. [B, V] -> [B, V], not in place."""
    touched = [i for i, row in enumerate(rows) if _is_adjusted(row)]
    if not touched:
        return logits
    logits = logits.clone()
    for i in touched:
        row, p = rows[i], rows[i].params
        if p.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({*row.prompt_ids, *row.tokens}), device=logits.device)
            values = logits[i, seen]
            logits[i, seen] = torch.where(
                values > 0, values / p.repetition_penalty, values * p.repetition_penalty
            )
        if row.tokens and (p.frequency_penalty or p.presence_penalty):
            counts = torch.bincount(
                torch.tensor(row.tokens, device=logits.device), minlength=logits.shape[-1]
            )
            logits[i] -= p.frequency_penalty * counts + p.presence_penalty * (counts > 0)
        if p.logit_bias:
            logits[i, torch.tensor(list(p.logit_bias), device=logits.device)] += torch.tensor(
                list(p.logit_bias.values()), device=logits.device
            )
        if row.banned:
            logits[i, list(row.banned)] = -torch.inf
    return logits


def _is_adjusted(row: Sampled) -> bool:
    p = row.params
    return bool(
        p.logit_bias
        or p.frequency_penalty
        or p.presence_penalty
        or p.repetition_penalty != 1.0
        or row.banned
    )


def _truncated(scaled: torch.Tensor, rows: Sequence[Sampled]) -> torch.Tensor:
    """min_p, top_k and top_p as -inf, for the rows that ask for any. [B, V] -> [B, V]."""
    touched = [
        i
        for i, row in enumerate(rows)
        if row.params.min_p > 0 or row.params.top_k > 0 or row.params.top_p < 1
    ]
    if not touched:
        return scaled
    params = [rows[i].params for i in touched]
    device, vocabulary = scaled.device, scaled.shape[-1]
    values, order = scaled[touched].sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(vocabulary, device=device)
    top_k = torch.tensor(
        [min(p.top_k, vocabulary) if p.top_k > 0 else vocabulary for p in params], device=device
    )
    min_p = torch.tensor([p.min_p for p in params], device=device).log()
    drop = (ranks[None] >= top_k[:, None]) | (values < values[:, :1] + min_p[:, None])
    probabilities = torch.softmax(values.masked_fill(drop, -torch.inf), dim=-1)
    top_p = torch.tensor([p.top_p for p in params], device=device)
    # A token stays when those before it have not reached top_p: the one that crosses it is the last to stay.
    before = probabilities.cumsum(dim=-1) - probabilities
    drop |= (before >= top_p[:, None]) & (top_p < 1)[:, None]
    kept = torch.empty_like(values).scatter_(-1, order, values.masked_fill(drop, -torch.inf))
    return scaled.index_copy(0, torch.tensor(touched, device=device), kept)
