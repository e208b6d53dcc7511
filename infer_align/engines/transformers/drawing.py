"""The draw of a step: logits become one token per row.

On a CPU, the logits are steered and then sampled. On a GPU, the fused sampler does both without
storing the steered logits. It serves the rows without top_p, top_k and min_p; the others, and those
whose steered logits are reported, take the two steps there too. Both ways invert the same
distribution at the same number, so a seed gives the same token up to rounding.

The way of a row depends on that row alone, so its token does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from infer_align.decoding.device import upload
from infer_align.decoding.sampler import is_truncated, sample, uniforms
from infer_align.decoding.siblings import ValueCache
from infer_align.decoding.steering import ValuedCandidates, add_values, value_candidates
from infer_align.decoding.steering_batch import SteeringBatch
from infer_align.engines.transformers.rows import Row
from infer_align.values import Value
from infer_align.values.head import HeadValue
from infer_align.values.lookahead import ValueLM
from infer_align_kernels import CandidateValues, HeadValues, runs_triton, value_reweight


class Drawn(NamedTuple):
    """The tokens of a step.

    Attributes:
        tokens: the token of each row.
        steered: [B, V] the logits after steering. Only a steered row of the fused sampler may hold
            those before it, since it computes the others without writing them.
        candidates: [B, k] the candidates that were valued; None if no row is steered.
    """

    tokens: list[int]
    steered: torch.Tensor
    candidates: torch.Tensor | None


@dataclass(slots=True)
class _Ways:
    """The rows of a batch by the way in which they are drawn.

    Attributes:
        two_step: rows that are steered, then sampled.
        fused: rows of the fused sampler with candidates or without steering.
        by_head: rows of the fused sampler in which one head values every token.
    """

    two_step: list[int] = field(default_factory=list)
    fused: list[int] = field(default_factory=list)
    by_head: dict[HeadValue, list[int]] = field(default_factory=dict)


def draw_tokens(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    rows: Sequence[Row],
    steering: SteeringBatch | None,
    caches: Mapping[ValueLM, ValueCache],
) -> Drawn:
    """Steer the logits and draw one token per row.

    Args:
        logits: [B, V] float32, adjusted and guided; they stay unchanged.
        hidden: [B, d] states that the output layer read.
        rows: the B rows.
        steering: their steering; None if no row is steered.
        caches: the cache of each value LM that steers a row.
    """
    if runs_triton(logits.device):
        return _draw_fused(logits, hidden, rows, steering, caches)
    if steering is None:
        return Drawn(sample(logits, rows), logits, None)
    valued = value_candidates(logits, hidden, steering, caches)
    steered = add_values(logits, hidden, steering, valued, in_place=False)
    return Drawn(sample(steered, rows), steered, None if valued is None else valued.ids)


def _draw_fused(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    rows: Sequence[Row],
    steering: SteeringBatch | None,
    caches: Mapping[ValueLM, ValueCache],
) -> Drawn:
    ways = _sort_rows(rows)
    valued = value_candidates(logits, hidden, steering, caches) if steering else None
    steered = logits
    tokens = [0] * len(rows)
    if ways.two_step:
        if steering is not None:
            steered = add_values(logits, hidden, steering, valued, in_place=False)
        chosen = sample(steered[ways.two_step], [rows[i] for i in ways.two_step])
        _place(tokens, ways.two_step, chosen)
    if ways.fused:
        values, beta = _candidate_values(steering, valued, ways.fused, logits.device)
        _place(tokens, ways.fused, _sample_fused(logits, rows, ways.fused, values, beta))
    for head, indices in ways.by_head.items():
        every = head.all_values(_select(hidden, indices).float())
        weights = [[rows[i].job.steering[head]] for i in indices]
        beta = upload(np.array(weights, np.float32), logits.device)
        _place(tokens, indices, _sample_fused(logits, rows, indices, every, beta))
    return Drawn(tokens, steered, None if valued is None else valued.ids)


def _sort_rows(rows: Sequence[Row]) -> _Ways:
    ways = _Ways()
    for i, row in enumerate(rows):
        steering = row.job.draw.steering
        weights = row.job.steering
        if is_truncated(row.params):
            ways.two_step.append(i)
        elif steering is None or not weights:
            ways.fused.append(i)
        elif row.is_due or row.params.logprobs is not None or steering.max_kl is not None:
            # The steered logits are reported, or compared with the frozen ones.
            ways.two_step.append(i)
        elif steering.candidates is not None:
            ways.fused.append(i)
        else:
            head = _only_head(weights)
            if head is None or steering.min_p:
                ways.two_step.append(i)
            else:
                ways.by_head.setdefault(head, []).append(i)
    return ways


def _only_head(weights: Mapping[Value, float]) -> HeadValue | None:
    """Return the head that steers alone; None if several values steer."""
    values = list(weights)
    first = values[0]
    return first if len(values) == 1 and isinstance(first, HeadValue) else None


def _candidate_values(
    steering: SteeringBatch | None,
    valued: ValuedCandidates | None,
    indices: list[int],
    device: torch.device,
) -> tuple[CandidateValues, torch.Tensor]:
    """Return the candidates of these rows with their values, and the weights. [n, M]."""
    n = len(indices)
    if steering is None or valued is None or not valued.values.numel():
        nothing = torch.full((n, 1), -1, dtype=torch.int64, device=device)
        zeros = torch.zeros((1, n, 1), device=device)
        return CandidateValues(nothing, zeros), zeros[0]
    tail = steering.tail
    if isinstance(tail, torch.Tensor):
        tail = _select(tail, indices)
    ids = _select(steering.valid(valued.ids), indices)
    values = _select(valued.values.transpose(0, 1), indices).transpose(0, 1)
    return CandidateValues(ids, values, tail), _select(steering.beta, indices)


def _sample_fused(
    logits: torch.Tensor,
    rows: Sequence[Row],
    indices: list[int],
    values: CandidateValues | HeadValues,
    beta: torch.Tensor,
) -> list[int]:
    """Sample one token for each of these rows of the logits."""
    temperatures: list[float] = []
    seeds: list[int] = []
    steps: list[int] = []
    for i in indices:
        temperatures.append(rows[i].params.temperature)
        seeds.append(rows[i].seed)
        steps.append(len(rows[i].tokens))
    numbers: NDArray[np.float64] = uniforms(seeds, steps)
    drawn = value_reweight(
        _select(logits, indices),
        values,
        beta,
        temperature=upload(np.array(temperatures, np.float32), logits.device),
        uniform=upload(numbers, logits.device),
    )
    # A row whose logits are all -inf after steering has no token; the first one stands for it.
    return drawn.token.clamp(min=0).tolist()


def _select(tensor: torch.Tensor, indices: list[int]) -> torch.Tensor:
    """Return these rows; the tensor itself if they are all of its rows, in order."""
    if len(indices) == len(tensor):
        return tensor
    return tensor.index_select(0, upload(np.array(indices), tensor.device))


def _place(tokens: list[int], indices: list[int], drawn: list[int]) -> None:
    for i, token in zip(indices, drawn, strict=True):
        tokens[i] = token
