"""Test top-k on CPU against a stable sort."""

from __future__ import annotations

import pytest
import torch

from infer_align_kernels import top_candidates
from infer_align_kernels.top_candidates import reference
from tests.kernels import cases
from tests.kernels.cases import DTYPES

INF = torch.inf
NAN = torch.nan


@pytest.mark.parametrize("distinct", [3, 40])
def test_top_candidates_order_equal_logits_by_id(distinct: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, distinct, (50, 200), generator=generator).float()
    logits[0] = -INF
    logits[1, :150] = NAN
    clean = logits.nan_to_num(nan=-INF, neginf=-INF)
    expected = clean.sort(dim=1, descending=True, stable=True).indices
    for k in (1, 7, 199, 200):
        assert torch.equal(top_candidates(logits, k), expected[:, :k])
        assert torch.equal(reference.top_candidates_by_key(logits, k), expected[:, :k])


@pytest.mark.parametrize("vocabulary", [4096, 6001, 32001, 70000])
def test_large_vocabularies_are_cut_into_tiles(vocabulary: int) -> None:
    # Few distinct logits in some rows, so that peaks and candidates are equal to others.
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, vocabulary, generator=generator)
    logits[1] = logits[1].round()
    logits[2] = (100 * logits[2]).round()
    logits[3] = 7.0
    logits[4] = -INF
    logits[4, -1] = 1.0
    logits[5, ::3] = NAN
    logits[6] = torch.arange(vocabulary)
    logits[7] = -torch.arange(vocabulary)
    logits[8, 5:9] = torch.tensor([INF, INF, -0.0, 0.0])
    clean = logits.nan_to_num(nan=-INF, neginf=-INF, posinf=INF)
    expected = clean.sort(dim=1, descending=True, stable=True).indices
    for k in (1, 2, 20, 124, vocabulary):
        assert torch.equal(top_candidates(logits, k), expected[:, :k])
    for row in range(len(logits)):
        assert torch.equal(top_candidates(logits[row : row + 1], 20), expected[row : row + 1, :20])


def test_equal_numbers_of_bfloat16_are_ordered_by_id() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = (4 * torch.randn(33, 50_000, generator=generator)).to(torch.bfloat16)
    expected = logits.float().sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(top_candidates(logits.float(), 20), expected[:, :20])
    assert torch.equal(top_candidates(logits, 20), expected[:, :20])


@DTYPES
def test_top_candidates_by_key_are_those_by_topk(dtype: torch.dtype) -> None:
    logits = cases.logits(40, 3001, dtype)
    logits[3, :5] = torch.tensor([0.0, -0.0, INF, -INF, NAN], dtype=dtype)
    logits[4].clamp_(-0.05, 0.05)
    for k in (1, 20, 3001):
        by_key = reference.top_candidates_by_key(logits, k)
        assert torch.equal(by_key, top_candidates(logits, k))


@pytest.mark.parametrize("k", [0, 41])
def test_a_k_beyond_the_vocabulary_is_named(k: int) -> None:
    with pytest.raises(ValueError, match=f"k: {k}"):
        top_candidates(cases.logits(2, 40), k)
