"""Inputs for the kernels' tests: awkward on purpose."""

from __future__ import annotations

from typing import Any

import torch

from infer_align_kernels import CandidateValues, HeadValues


def logits(
    rows: int, vocabulary: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    """Rows of a wider tensor, so not contiguous, between columns of NaN; some logits -inf and NaN."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.full((rows, vocabulary + 5), torch.nan, dtype=dtype)
    wide[:, 2 : vocabulary + 2] = (torch.randn(rows, vocabulary, generator=g) * 3).to(dtype)
    inner = wide[:, 2 : vocabulary + 2]
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
    g = torch.Generator().manual_seed(seed)
    return HeadValues(
        hidden=torch.randn(rows, values, rank, generator=g).to(dtype),
        weight=(torch.randn(values, vocabulary, rank, generator=g) * rank**-0.5).to(dtype),
        bias=torch.randn(values, vocabulary, generator=g),
    )


def candidates(
    frozen: torch.Tensor, k: int, values: int, tail: Any = "keep", seed: int = 2
) -> CandidateValues:
    """The top k, the last row one slot short, one value NaN in the first row."""
    g = torch.Generator().manual_seed(seed)
    ids = frozen.float().nan_to_num(nan=-torch.inf, neginf=-torch.inf).topk(k, dim=1).indices
    scored = torch.randn(values, len(ids), k, generator=g) + 50
    if len(ids) and k > 2:
        ids[-1, -1] = -1
        scored[0, 0, 1] = torch.nan
    return CandidateValues(ids, scored, tail)


def sampling(rows: int, seed: int = 3) -> dict[str, torch.Tensor]:
    """Temperatures around 1, the second row greedy."""
    g = torch.Generator().manual_seed(seed)
    temperature = torch.rand(rows, generator=g) + 0.5
    temperature[1:2] = 0
    return {
        "temperature": temperature,
        "seed": torch.randint(-(2**62), 2**62, (rows,), generator=g),
        "step": torch.arange(rows, dtype=torch.int32) * 7,
    }


def strengths(rows: int, values: int, seed: int = 4) -> torch.Tensor:
    """Betas of both signs; the third row does not steer."""
    beta = torch.randn(rows, values, generator=torch.Generator().manual_seed(seed))
    beta[2:3] = 0
    return beta


def bitmask(rows: int, vocabulary: int, seed: int = 5) -> torch.Tensor:
    words = torch.randint(
        -(2**31), 2**31, (rows, -(-vocabulary // 32)), generator=torch.Generator().manual_seed(seed)
    )
    return words.to(torch.int32)
