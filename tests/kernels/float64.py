"""The definitions of the kernels, row by row in float64.

They are written from the READMEs, not from the code that they check.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from infer_align_kernels import CandidateValues, HeadValues, Sampled

LARGEST = float(torch.finfo(torch.float32).max)


def clean(row: np.ndarray) -> np.ndarray:
    row = np.where(np.isnan(row), -np.inf, row)
    return np.minimum(row, LARGEST)


def add_candidates(
    row: np.ndarray, b: int, candidates: CandidateValues, beta: np.ndarray
) -> np.ndarray:
    """Steer one row of logits by its candidates."""
    ids = candidates.token_ids[b].tolist()
    values = candidates.values[:, b].double().numpy()
    slots = [j for j, token in enumerate(ids) if token >= 0]
    active = [m for m in range(len(beta)) if beta[m] != 0]
    if not active or not slots:
        return row
    tail = candidates.tail
    masks_tail = bool(tail[b]) if isinstance(tail, torch.Tensor) else tail == "mask"
    out = np.full_like(row, -np.inf) if masks_tail else row.copy()
    finite = [j for j in slots if all(math.isfinite(values[m, j]) for m in active)]
    for j in slots:
        shift = -np.inf
        if j in finite:
            shift = sum(beta[m] * (values[m, j] - np.mean(values[m, finite])) for m in active)
        out[ids[j]] = row[ids[j]] + shift
    return out


def add_head(row: np.ndarray, b: int, head: HeadValues, beta: np.ndarray) -> np.ndarray:
    """Steer one row of logits by a head."""
    out = row.copy()
    for m in range(len(beta)):
        if beta[m] == 0:
            continue
        q = head.weight[m].double().numpy() @ head.hidden[b, m].double().numpy()
        if head.bias is not None:
            q = q + head.bias[m].double().numpy()
        out = out + beta[m] * q
    return out


def distributions(
    logits: torch.Tensor,
    values: HeadValues | CandidateValues,
    beta: torch.Tensor,
    temperature: torch.Tensor,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the steered and the frozen logits over temperature. -> [B, V], [B, V]."""
    steered = []
    frozen = []
    for b in range(len(logits)):
        row = clean(logits[b].double().numpy())
        strength = beta[b].double().numpy()
        with np.errstate(invalid="ignore", over="ignore"):
            if isinstance(values, HeadValues):
                steered_row = add_head(row, b, values, strength)
            else:
                steered_row = add_candidates(row, b, values, strength)
            steered_row = clean(steered_row)
        divisor = float(temperature[b]) if temperature[b] > 0 else 1.0
        steered.append(steered_row / divisor)
        frozen.append(row / divisor)
    return np.array(steered), np.array(frozen)


def logsumexp(scores: np.ndarray) -> np.ndarray:
    peak = np.maximum(scores.max(axis=1), -LARGEST)
    with np.errstate(divide="ignore"):
        return peak + np.log(np.exp(scores - peak[:, None]).sum(axis=1))


def assert_sampled(
    sampled: Sampled, steered: np.ndarray, frozen: np.ndarray, temperature: torch.Tensor
) -> None:
    """Check a sampled token and its numbers against the distributions of each row."""
    token = sampled.token.numpy()
    has_token = ~np.isneginf(steered).all(axis=1)
    assert ((token >= 0) == has_token).all()
    assert (token[~has_token] == -1).all()
    rows = np.flatnonzero(has_token)
    chosen = (rows, token[rows])
    assert (steered[chosen] > -np.inf).all()
    greedy = rows[temperature.numpy()[rows] <= 0]
    assert (steered[greedy, token[greedy]] >= steered[greedy].max(axis=1) - 1e-5).all()
    lse = logsumexp(steered)[rows]
    logprob = steered[chosen] - lse
    frozen_logprob = frozen[chosen] - logsumexp(frozen)[rows]
    np.testing.assert_allclose(sampled.logsumexp.numpy()[rows], lse, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(sampled.logprob.numpy()[rows], logprob, atol=2e-5)
    np.testing.assert_allclose(sampled.frozen_logprob.numpy()[rows], frozen_logprob, atol=2e-5)


def attention(
    query: torch.Tensor,
    prefix_keys: torch.Tensor,
    prefix_values: torch.Tensor,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Compute one softmax per sibling, over its prefix and itself."""
    rows, heads, siblings, dim = query.shape
    out = torch.zeros(query.shape, dtype=torch.float64)
    for b, h, j in np.ndindex(rows, heads, siblings):
        kv_head = h * prefix_keys.shape[1] // heads
        start = prefix_keys.shape[2] - int(lengths[b])
        own_key = own_keys[b, kv_head, j : j + 1]
        own_value = own_values[b, kv_head, j : j + 1]
        keys = torch.cat([prefix_keys[b, kv_head, start:], own_key]).double()
        values = torch.cat([prefix_values[b, kv_head, start:], own_value]).double()
        scores = keys @ query[b, h, j].double() / dim**0.5
        out[b, h, j] = torch.softmax(scores, dim=0) @ values
    return out
