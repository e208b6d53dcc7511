"""Awkward inputs for the tests of the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from infer_align_kernels import CandidateValues, HeadValues

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


def logits(
    rows: int, vocabulary: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    """Make strided rows between columns of NaN, with a logit of -inf and one of NaN."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.full((rows, vocabulary + 5), torch.nan, dtype=dtype)
    inner = wide[:, 2 : vocabulary + 2]
    inner.copy_(torch.randn(rows, vocabulary, generator=generator) * 3)
    if rows and vocabulary > 12:
        inner[0, 5] = -torch.inf
        inner[-1, 7] = torch.nan
    return inner


def head(
    rows: int,
    vocabulary: int,
    rank: int,
    values: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> HeadValues:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, values, rank, generator=generator)
    weight = torch.randn(values, vocabulary, rank, generator=generator) * rank**-0.5
    bias = torch.randn(values, vocabulary, generator=generator)
    return HeadValues(hidden.to(dtype), weight.to(dtype), bias)


def candidates(
    frozen: torch.Tensor, k: int, values: int, tail: Any = "keep", seed: int = 2
) -> CandidateValues:
    """Take the top k; the last row has one slot less, and the first row has a value of NaN."""
    generator = torch.Generator().manual_seed(seed)
    clean = frozen.float().nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    ids = clean.topk(k, dim=1).indices
    scores = torch.randn(values, len(ids), k, generator=generator) + 50
    if len(ids) and k > 2:
        ids[-1, -1] = -1
        scores[0, 0, 1] = torch.nan
    return CandidateValues(ids, scores, tail)


def sampling(rows: int, seed: int = 3) -> dict[str, torch.Tensor]:
    """Make temperatures around 1; the second row is greedy."""
    generator = torch.Generator().manual_seed(seed)
    temperature = torch.rand(rows, generator=generator) + 0.5
    temperature[1:2] = 0
    return {
        "temperature": temperature,
        "uniform": torch.rand(rows, generator=generator, dtype=torch.float64),
    }


def select_rows(sampling: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    """Return the sampling arguments of some rows."""
    return {name: tensor[rows] for name, tensor in sampling.items()}


def strengths(rows: int, values: int, seed: int = 4) -> torch.Tensor:
    """Make betas of both signs; the third row does not steer."""
    beta = torch.randn(rows, values, generator=torch.Generator().manual_seed(seed))
    beta[2:3] = 0
    return beta


def forbid(logits: torch.Tensor, seed: int = 5) -> None:
    """Set half of the logits to -inf, as a grammar does, and all those of the fourth row."""
    generator = torch.Generator().manual_seed(seed)
    logits[torch.rand(logits.shape, generator=generator) < 0.5] = -torch.inf
    logits[3:4] = -torch.inf
