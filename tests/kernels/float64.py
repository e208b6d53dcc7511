"""The definitions again, row by row in float64, written from the READMEs and not from the code they check."""

from __future__ import annotations

import math

import numpy as np
import torch

from infer_align_kernels import CandidateValues, HeadValues

LARGEST = float(torch.finfo(torch.float32).max)


def clean(row: np.ndarray) -> np.ndarray:
    row = np.where(np.isnan(row), -np.inf, row)
    return np.minimum(row, LARGEST)


def allowed(bitmask: torch.Tensor | None, b: int, vocabulary: int) -> np.ndarray:
    if bitmask is None:
        return np.ones(vocabulary, dtype=bool)
    return np.array([bool(int(bitmask[b, t // 32]) >> (t % 32) & 1) for t in range(vocabulary)])


def add_candidates(row: np.ndarray, b: int, c: CandidateValues, beta: np.ndarray) -> np.ndarray:
    """One row of logits, steered by its candidates."""
    ids = c.token_ids[b].tolist()
    slots = [j for j, token in enumerate(ids) if token >= 0]
    values = c.values[:, b].double().numpy()
    used = [m for m in range(len(beta)) if beta[m] != 0]
    if not used or not slots:
        return row
    drop = bool(c.tail[b]) if isinstance(c.tail, torch.Tensor) else c.tail == "mask"
    finite = [j for j in slots if all(math.isfinite(values[m, j]) for m in used)]
    out = np.full_like(row, -np.inf) if drop else row.copy()
    for j in slots:
        shift = (
            sum(beta[m] * (values[m, j] - np.mean(values[m, finite])) for m in used)
            if j in finite
            else -np.inf
        )
        out[ids[j]] = row[ids[j]] + shift
    return out


def add_head(row: np.ndarray, b: int, head: HeadValues, beta: np.ndarray) -> np.ndarray:
    out = row.copy()
    for m in range(len(beta)):
        if beta[m] != 0:
            q = head.weight[m].double().numpy() @ head.hidden[b, m].double().numpy()
            out = out + beta[m] * (q if head.bias is None else q + head.bias[m].double().numpy())
    return out


def distributions(
    logits: torch.Tensor,
    values: HeadValues | CandidateValues,
    beta: torch.Tensor,
    temperature: torch.Tensor,
    bitmask: torch.Tensor | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores over temperature, steered and frozen. -> [B, V], [B, V]."""
    steered, frozen = [], []
    for b in range(len(logits)):
        row = clean(
            np.where(allowed(bitmask, b, logits.shape[1]), logits[b].double().numpy(), -np.inf)
        )
        strength = beta[b].double().numpy()
        with np.errstate(invalid="ignore", over="ignore"):
            add = add_head if isinstance(values, HeadValues) else add_candidates
            mine = clean(add(row, b, values, strength))
        heat = float(temperature[b]) if temperature[b] > 0 else 1.0
        steered.append(mine / heat)
        frozen.append(row / heat)
    return np.array(steered), np.array(frozen)


def logsumexp(scores: np.ndarray) -> np.ndarray:
    peak = np.maximum(scores.max(axis=1), -LARGEST)
    with np.errstate(divide="ignore"):
        return peak + np.log(np.exp(scores - peak[:, None]).sum(axis=1))


def attention(
    query: torch.Tensor,
    prefix_keys: torch.Tensor,
    prefix_values: torch.Tensor,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    rows, heads, siblings, dim = query.shape
    out = torch.zeros(query.shape, dtype=torch.float64)
    for b in range(rows):
        start = prefix_keys.shape[2] - int(lengths[b])
        for h in range(heads):
            g = h * prefix_keys.shape[1] // heads
            for j in range(siblings):
                keys = torch.cat([prefix_keys[b, g, start:], own_keys[b, g, j : j + 1]]).double()
                values = torch.cat(
                    [prefix_values[b, g, start:], own_values[b, g, j : j + 1]]
                ).double()
                out[b, h, j] = (
                    torch.softmax(keys @ query[b, h, j].double() / dim**0.5, dim=0) @ values
                )
    return out
