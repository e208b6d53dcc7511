"""Test the Triton code of top-k, interpreted, against a stable sort."""

from __future__ import annotations

import pytest
import torch

from infer_align_kernels import top_candidates
from infer_align_kernels.top_candidates import MAX_CANDIDATES, reference, triton
from tests.kernels import cases
from tests.kernels.cases import DTYPES

INF = torch.inf
NAN = torch.nan


def by_sorting(logits: torch.Tensor, k: int) -> torch.Tensor:
    clean = logits.float().nan_to_num(nan=-INF, posinf=INF, neginf=-INF)
    return clean.sort(dim=1, descending=True, stable=True).indices[:, :k]


# Vocabularies around one tile, one block and a tile of another size; k up to the kernel's most.
@DTYPES
@pytest.mark.parametrize(
    ("rows", "vocabulary", "k"),
    [
        (1, 1, 1),
        (2, 63, 63),
        (3, 64, 20),
        (5, 65, 3),
        (3, 4097, 20),
        (1, 128256, 20),
        (1, 151936, 20),
        pytest.param(2, 32001, 64, marks=pytest.mark.slow),
        pytest.param(2, 9000, MAX_CANDIDATES, marks=pytest.mark.slow),
    ],
)
def test_the_candidates_are_those_of_a_stable_sort(
    rows: int, vocabulary: int, k: int, dtype: torch.dtype
) -> None:
    logits = cases.logits(rows, vocabulary, dtype)
    assert torch.equal(triton.top_candidates(logits, k), by_sorting(logits, k))


@pytest.mark.parametrize("k", [1, 7, pytest.param(128, marks=pytest.mark.slow)])
def test_equal_logits_are_ordered_by_id(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 4, (6, 700), generator=generator).float()
    # Rows full of one logit, of -inf, of NaN, of both zeros, and with few finite logits.
    logits[0] = 2.5
    logits[1] = -INF
    logits[2] = NAN
    logits[3] = torch.tensor([0.0, -0.0]).repeat(350)
    logits[4] = -INF
    logits[4, [3, 650]] = torch.tensor([1.0, INF])
    expected = by_sorting(logits, k)
    assert torch.equal(triton.top_candidates(logits, k), expected)
    assert torch.equal(reference.top_candidates_by_key(logits, k), expected)


def test_the_largest_logits_may_stand_side_by_side() -> None:
    # All of them are in one tile, or each is the smallest of its tile's largest.
    logits = torch.arange(3000, dtype=torch.float32).expand(2, -1).clone()
    logits[1] = logits[1].flip(0)
    assert torch.equal(triton.top_candidates(logits, 70), by_sorting(logits, 70))


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = torch.randint(0, 9, (5, 500)).float()
    together = triton.top_candidates(logits, 12)
    for b in range(5):
        assert torch.equal(triton.top_candidates(logits[b : b + 1], 12), together[b : b + 1])


@pytest.mark.parametrize("k", [20, 129, 300])
def test_every_k_is_selected_where_kernels_run(k: int) -> None:
    logits = cases.logits(3, 300)
    assert torch.equal(top_candidates(logits, k), by_sorting(logits, k))


def test_tokens_may_be_strided_and_a_batch_empty() -> None:
    logits = torch.randn(300, 4).T
    assert torch.equal(triton.top_candidates(logits, 9), by_sorting(logits, 9))
    assert triton.top_candidates(logits[:0], 9).shape == (0, 9)
