"""The sampler: logits become tokens, each row by its own parameters and its own seed.

    adjust (penalties, biases, bans) -> steering -> temperature -> min_p, top_k, top_p -> CDF

A row's token depends on nothing else in the batch. In shapes, B is the number of rows and V the
size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from infer_align.decoding.params import SamplingParams

# Constants of splitmix64, the random generator of Steele, Lea and Flood ("Fast splittable
# pseudorandom number generators", 2014).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_1 = np.uint64(0xBF58476D1CE4E5B9)
_FACTOR_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1 = np.uint64(30)
_SHIFT_2 = np.uint64(27)
_SHIFT_3 = np.uint64(31)
# A float64 has 53 bits of precision: the upper 53 of 64 become a number in [0, 1).
_LOW_BITS = np.uint64(11)
_SCALE = 2.0**-53


class SampledRow(Protocol):
    """A candidate that the sampler extends by one token.

    Attributes:
        seed: the candidate's own seed.
        tokens: the tokens sampled so far.
    """

    seed: int
    tokens: list[int]

    @property
    def params(self) -> SamplingParams:
        """Return the sampling parameters."""

    @property
    def prompt_ids(self) -> list[int]:
        """Return the tokens of the prompt."""

    @property
    def banned(self) -> frozenset[int]:
        """Return the tokens that may not be sampled now."""


def sample(logits: torch.Tensor, rows: Sequence[SampledRow]) -> list[int]:
    """Sample one token per row: [B, V] float32, adjusted and steered -> B ids.

    The random number of a row depends on its seed and its number of tokens alone.
    """
    params: list[SamplingParams] = []
    seeds: list[int] = []
    steps: list[int] = []
    for row in rows:
        params.append(row.params)
        seeds.append(row.seed)
        steps.append(len(row.tokens))
    return sample_at(logits, params, uniforms(seeds, steps))


def sample_at(
    logits: torch.Tensor, params: Sequence[SamplingParams], numbers: NDArray[np.float64]
) -> list[int]:
    """Sample one token per row by inverse CDF at the given numbers.

    Temperature comes first, then min_p, top_k and top_p. Temperature 0 takes the largest logit,
    and the lowest id of equal ones. Any other takes the first token whose cumulative probability
    exceeds the row's number.

    Args:
        logits: [B, V] float32 or float64.
        params: of each row.
        numbers: [B] in [0, 1).

    Returns:
        B token ids.
    """
    device = logits.device
    temperature = torch.tensor([p.temperature for p in params], dtype=logits.dtype, device=device)
    greedy = logits.argmax(dim=-1)
    if not bool((temperature > 0).any()):
        return greedy.tolist()
    # Greedy rows are divided too, by a number over 0. Their result is not used.
    divisor = temperature.clamp(min=1e-6)[:, None]
    scaled = truncate(logits / divisor, params)
    probabilities = torch.softmax(scaled, dim=-1, dtype=torch.float64)
    cdf = probabilities.cumsum(dim=-1)
    # Rounding leaves the sum near 1, so the number is a share of the sum.
    total = cdf[:, -1:]
    point = torch.from_numpy(numbers).to(device)[:, None] * total
    sampled = torch.searchsorted(cdf, point, right=True)[:, 0]
    # Rounding can put the point past the last token.
    sampled = sampled.clamp(max=logits.shape[-1] - 1)
    return torch.where(temperature > 0, sampled, greedy).tolist()


def uniforms(seeds: Sequence[int], steps: Sequence[int]) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each row: [B], [B] -> [B].

    Two rounds of splitmix64, one for the seed and one for the step. A row gets the same numbers in
    any batch.

    Args:
        seeds: the seed of each row, from 0 to 2^64 - 1.
        steps: the tokens that each row has sampled.
    """
    seed = np.array(seeds, dtype=np.uint64)
    step = np.array(steps, dtype=np.uint64)
    with np.errstate(over="ignore"):
        state = _mix(seed + _GOLDEN)
        state = _mix(state + step * _GOLDEN)
    upper_bits = state >> _LOW_BITS
    return upper_bits.astype(np.float64) * _SCALE


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread each bit over all 64: the output function of splitmix64."""
    z = (z ^ (z >> _SHIFT_1)) * _FACTOR_1
    z = (z ^ (z >> _SHIFT_2)) * _FACTOR_2
    return z ^ (z >> _SHIFT_3)


def adjust(logits: torch.Tensor, rows: Sequence[SampledRow]) -> torch.Tensor:
    """Apply penalties, biases and bans, which come before steering. [B, V] -> [B, V].

    The argument stays unchanged.
    """
    indices = [i for i, row in enumerate(rows) if _is_adjusted(row)]
    if not indices:
        return logits
    logits = logits.clone()
    for i in indices:
        _adjust_row(logits[i], rows[i])
    return logits


def _is_adjusted(row: SampledRow) -> bool:
    """Return True if `_adjust_row` would change the logits of the row."""
    p = row.params
    if p.frequency_penalty or p.presence_penalty or p.repetition_penalty != 1.0:
        return True
    return bool(p.logit_bias or row.banned)


def _adjust_row(logits: torch.Tensor, row: SampledRow) -> None:
    """Adjust one row in place. [V].

    Penalties follow the APIs that define them. `repetition_penalty` divides positive logits of used
    tokens and multiplies negative ones (Keskar et al., "CTRL", 1909.05858); tokens of the prompt
    count as used. `frequency_penalty` and `presence_penalty` are OpenAI's and see only sampled
    tokens.
    """
    p = row.params
    device = logits.device
    if p.repetition_penalty != 1.0:
        used = torch.tensor(sorted({*row.prompt_ids, *row.tokens}), device=device)
        values = logits[used]
        lowered = values / p.repetition_penalty
        logits[used] = torch.where(values > 0, lowered, values * p.repetition_penalty)
    if row.tokens and (p.frequency_penalty or p.presence_penalty):
        tokens = torch.tensor(row.tokens, device=device)
        counts = torch.bincount(tokens, minlength=len(logits))
        is_used = counts > 0
        logits -= p.frequency_penalty * counts + p.presence_penalty * is_used
    if p.logit_bias:
        ids = torch.tensor(list(p.logit_bias), device=device)
        amounts = torch.tensor(list(p.logit_bias.values()), device=device)
        logits[ids] += amounts
    if row.banned:
        logits[list(row.banned)] = -torch.inf


def truncate(scaled: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Set what min_p, top_k and top_p exclude to -inf. [B, V] after temperature -> [B, V]."""
    indices = [i for i, p in enumerate(params) if is_truncated(p)]
    if not indices:
        return scaled
    places = torch.tensor(indices, device=scaled.device)
    truncated = _truncate_rows(scaled[indices], [params[i] for i in indices])
    return scaled.index_copy(0, places, truncated)


def is_truncated(p: SamplingParams) -> bool:
    """Return True if min_p, top_k or top_p excludes tokens."""
    return p.min_p > 0 or p.top_k > 0 or p.top_p < 1


def _truncate_rows(scaled: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Truncate rows that all have a min_p, top_k or top_p: [R, V] -> [R, V].

    The tokens are sorted by their logits, so that each parameter keeps a beginning of a row.
    """
    vocabulary = scaled.shape[-1]

    def column(numbers: list[float]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=scaled.dtype, device=scaled.device)[:, None]

    values, order = scaled.sort(dim=-1, descending=True, stable=True)
    counts: list[int] = []
    min_ps: list[float] = []
    top_ps: list[float] = []
    for p in params:
        counts.append(p.top_k if 0 < p.top_k < vocabulary else vocabulary)
        min_ps.append(p.min_p)
        top_ps.append(p.top_p)
    top_k = torch.tensor(counts, device=scaled.device)[:, None]
    ranks = torch.arange(vocabulary, device=scaled.device)[None]
    # p >= min_p * p_max, in logits.
    lowest = values[:, :1] + column(min_ps).log()
    excluded = (ranks >= top_k) | (values < lowest)
    # top_p counts the probability of the tokens that the other two parameters leave.
    remaining = values.masked_fill(excluded, -torch.inf)
    probabilities = torch.softmax(remaining, dim=-1)
    # A token stays if the tokens before it have not reached top_p. The one that crosses top_p is
    # the last to stay.
    top_p = column(top_ps)
    preceding = probabilities.cumsum(dim=-1) - probabilities
    excluded |= (preceding >= top_p) & (top_p < 1)
    truncated = values.masked_fill(excluded, -torch.inf)
    # Back to the order of the vocabulary.
    return torch.empty_like(values).scatter_(-1, order, truncated)
