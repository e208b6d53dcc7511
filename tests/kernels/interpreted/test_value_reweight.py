"""The Triton code of value reweighting, interpreted, against float64 and against the torch reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from infer_align_kernels import CandidateValues, HeadValues, Sampled
from infer_align_kernels.value_reweight import reference, triton
from tests.kernels import cases, float64

FIELDS = ("token", "logsumexp", "logprob", "frozen_logprob")
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


def run(
    logits: torch.Tensor,
    values: HeadValues | CandidateValues,
    beta: torch.Tensor,
    bitmask: Any = None,
    **sampling: torch.Tensor,
) -> Sampled:
    return triton.value_reweight(logits, values, beta, **sampling, bitmask=bitmask, workspace=None)


def assert_right(
    got: Sampled,
    logits: torch.Tensor,
    values: Any,
    beta: torch.Tensor,
    sampling: dict[str, torch.Tensor],
    mask: Any = None,
) -> None:
    heat = sampling["temperature"]
    steered, frozen = float64.distributions(logits, values, beta, heat, mask)
    token, rows = got.token.numpy(), np.arange(len(logits))
    dead = np.isneginf(steered).all(axis=1)
    assert ((token == -1) == dead).all()
    at = (rows[~dead], token[~dead])
    assert (steered[at] > -np.inf).all()
    assert all(steered[b, token[b]] >= steered[b].max() - 1e-5 for b in rows[~dead] if heat[b] <= 0)
    lse, frozen_lse = float64.logsumexp(steered)[~dead], float64.logsumexp(frozen)[~dead]
    np.testing.assert_allclose(got.logsumexp.numpy()[~dead], lse, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(got.logprob.numpy()[~dead], steered[at] - lse, atol=2e-5)
    np.testing.assert_allclose(
        got.frozen_logprob.numpy()[~dead], frozen[at] - frozen_lse, atol=2e-5
    )
    expected = reference.value_reweight(logits, values, beta, **sampling, bitmask=mask)
    assert got.token.tolist() == expected.token.tolist()


# Rows and vocabulary around the tiles; rank below, at and over a step of the product.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 127, 16, 1), torch.float32),
        ((3, 700, 48, 2), torch.float32),
        ((3, 700, 48, 2), torch.bfloat16),
        ((3, 129, 144, 3), torch.float16),
    ],
    ids=str,
)
def test_head(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows, vocabulary, rank, values = shape
    logits, head = (
        cases.logits(rows, vocabulary, dtype),
        cases.head(rows, vocabulary, rank, values, dtype),
    )
    beta, sampling, mask = (
        cases.strengths(rows, values),
        cases.sampling(rows),
        cases.bitmask(rows, vocabulary),
    )
    assert_right(run(logits, head, beta, **sampling), logits, head, beta, sampling)
    without = HeadValues(head.hidden, head.weight)
    assert_right(
        run(logits, without, beta, mask, **sampling), logits, without, beta, sampling, mask
    )


@pytest.mark.parametrize(
    ("tail", "dtype"),
    [("keep", torch.float32), ("mask", torch.bfloat16), ("per_row", torch.float16)],
)
def test_candidates(tail: Any, dtype: torch.dtype) -> None:
    # Two tiles of tokens, and more candidates than a power of two.
    logits = cases.logits(4, 2500, dtype)
    given = cases.candidates(
        logits, 9, 2, torch.tensor([True, False, True, True]) if tail == "per_row" else tail
    )
    beta, sampling, mask = cases.strengths(4, 2), cases.sampling(4), cases.bitmask(4, 2500)
    assert_right(run(logits, given, beta, **sampling), logits, given, beta, sampling)
    mask[3] = 0
    assert_right(run(logits, given, beta, mask, **sampling), logits, given, beta, sampling, mask)


@pytest.mark.parametrize("tail", ["keep", "mask", "per_row"])
def test_reweight_logits(tail: Any) -> None:
    logits = cases.logits(4, 2500)
    given = cases.candidates(
        logits, 9, 2, torch.tensor([True, False, True, True]) if tail == "per_row" else tail
    )
    beta = cases.strengths(4, 2)
    arguments = (given.token_ids, given.values, beta, given.tail)
    expected = reference.reweight_logits(logits, *arguments, out=None)
    got = triton.reweight_logits(logits, *arguments, out=None)
    torch.testing.assert_close(
        got, expected, equal_nan=True, atol=2e-5, rtol=1e-6
    )  # values around 50, centred in float32
    assert torch.equal(got[2].view(torch.int32), logits[2].view(torch.int32))
    mine = logits.clone()
    triton.reweight_logits(mine, *arguments, out=mine)
    assert torch.equal(mine.nan_to_num(nan=9.0), got.nan_to_num(nan=9.0))


@DTYPES
def test_candidate_values(dtype: torch.dtype) -> None:
    head = cases.head(3, 300, 144, 2, dtype)
    ids = torch.randint(0, 300, (3, 17))
    got = triton.candidate_values(ids, head.hidden, head.weight, head.bias)
    torch.testing.assert_close(
        got,
        reference.candidate_values(ids, head.hidden, head.weight, head.bias),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_row_that_does_not_steer_is_the_frozen_model_bit_for_bit() -> None:
    logits, sampling = cases.logits(3, 200), cases.sampling(3)
    head = HeadValues(torch.full((3, 2, 16), torch.nan), torch.full((2, 200, 16), torch.inf))
    given = CandidateValues(torch.arange(5).expand(3, 5), torch.full((2, 3, 5), torch.nan), "mask")
    for values in (head, given):
        got = run(logits, values, torch.zeros(3, 2), **sampling)
        assert torch.equal(got.logprob, got.frozen_logprob)
        assert_right(got, logits, values, torch.zeros(3, 2), sampling)


def test_a_row_does_not_depend_on_its_batch() -> None:
    rows = 19  # over a block of rows
    logits, head = cases.logits(rows, 300), cases.head(rows, 300, 32, 2)
    given = cases.candidates(logits, 8, 2)
    beta, sampling = cases.strengths(rows, 2), cases.sampling(rows)
    dense, sparse = run(logits, head, beta, **sampling), run(logits, given, beta, **sampling)
    for b in (0, 2, 18):
        one = slice(b, b + 1)
        mine = {k: v[one] for k, v in sampling.items()}
        alone = run(
            logits[one], HeadValues(head.hidden[one], head.weight, head.bias), beta[one], **mine
        )
        assert all(torch.equal(getattr(alone, f), getattr(dense, f)[one]) for f in FIELDS)
        alone = run(
            logits[one],
            CandidateValues(given.token_ids[one], given.values[:, one]),
            beta[one],
            **mine,
        )
        assert all(torch.equal(getattr(alone, f), getattr(sparse, f)[one]) for f in FIELDS)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_odd_logits() -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [[nan, 1.0, nan, 1.0], [0.0, inf, 0.0, inf], [-inf, nan, -inf, nan], [1.0, 3.0, 3.0, 0.0]]
    )
    sampling = cases.sampling(4) | {"temperature": torch.tensor([0.0, 1e-45, 1.0, -1.0])}
    given = CandidateValues(torch.arange(4).expand(4, 4), torch.zeros(1, 4, 4))
    for values in (given, HeadValues(torch.zeros(4, 1, 16), torch.zeros(1, 4, 16))):
        got = run(logits, values, torch.ones(4, 1), **sampling)
        assert got.token.tolist()[0] == 1
        assert got.token.tolist()[1] in {1, 3}
        assert got.token.tolist()[2:] == [-1, 1]
        assert got.logprob[2] == -inf


def test_a_workspace_is_enough_and_a_small_one_is_refused() -> None:
    logits, head = cases.logits(3, 700), cases.head(3, 700, 16, 1)
    sampling, beta = cases.sampling(3), cases.strengths(3, 1)
    space = triton.allocate_workspace(4, 700, "cpu")
    got = triton.value_reweight(logits, head, beta, **sampling, bitmask=None, workspace=space)
    assert torch.equal(got.logprob, run(logits, head, beta, **sampling).logprob)
    with pytest.raises(ValueError, match="workspace"):
        triton.value_reweight(logits, head, beta, **sampling, bitmask=None, workspace=space[:20])


def test_no_rows() -> None:
    got = run(cases.logits(0, 40), cases.head(0, 40, 16, 1), torch.zeros(0, 1), **cases.sampling(0))
    assert got.token.shape == got.logprob.shape == (0,)


@pytest.mark.slow
def test_the_sampler_follows_the_distribution() -> None:
    """Small, since every draw is a program of its own here; the reference, which gives the same tokens, is drawn from at length."""
    draws, vocabulary = 1_200, 90
    row, head = torch.randn(1, vocabulary), cases.head(1, vocabulary, 16, 1)
    beta, heat = torch.ones(1, 1), torch.tensor([0.9])
    steered, _ = float64.distributions(row, head, beta, heat)
    expected = np.exp(steered[0] - float64.logsumexp(steered)[0]) * draws
    many = HeadValues(head.hidden.expand(draws, -1, -1), head.weight, head.bias)
    got = run(
        row.expand(draws, -1),
        many,
        beta.expand(draws, -1),
        temperature=heat.expand(draws),
        seed=torch.arange(draws),
        step=torch.zeros(draws, dtype=torch.int32),
    )
    counts = np.bincount(got.token.numpy(), minlength=vocabulary)
    often = expected >= 5
    counts, expected = (
        np.append(counts[often], counts[~often].sum()),
        np.append(expected[often], expected[~often].sum()),
    )
    freedom = len(counts) - 1
    assert abs(((counts - expected) ** 2 / expected).sum() - freedom) < 4 * np.sqrt(2 * freedom)
