"""Test value reweighting on CPU: against float64, with odd numbers, and the draw."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

import infer_align_kernels as kernels
from infer_align_kernels import (
    CandidateValues,
    HeadValues,
    Sampled,
    candidate_values,
    reweight_logits,
    value_reweight,
)
from tests.kernels import cases, float64
from tests.kernels.cases import DTYPES

INF = torch.inf
NAN = torch.nan
SHAPES = pytest.mark.parametrize(
    ("rows", "vocabulary"), [(1, 32000), (3, 32001), (257, 1003), (3, 128256), (3, 151936)]
)


def sample_one_row(logits: list[float], temperature: float = 1.0, uniform: float = 0.4) -> Sampled:
    """Sample from one row; every token is a candidate of value 0."""
    candidates = CandidateValues(torch.arange(len(logits))[None], torch.zeros(1, 1, len(logits)))
    return value_reweight(
        torch.tensor([logits]),
        candidates,
        torch.ones(1, 1),
        temperature=torch.tensor([temperature]),
        uniform=torch.tensor([uniform], dtype=torch.float64),
    )


@pytest.mark.slow
@DTYPES
@SHAPES
def test_sampling_by_a_head_matches_the_definition(
    rows: int, vocabulary: int, dtype: torch.dtype
) -> None:
    logits = cases.logits(rows, vocabulary, dtype)
    head = cases.head(rows, vocabulary, 48, 2, dtype)
    beta, sampling = cases.strengths(rows, 2), cases.sampling(rows)
    temperature = sampling["temperature"]
    sampled = value_reweight(logits, head, beta, **sampling)
    steered, frozen = float64.distributions(logits, head, beta, temperature)
    float64.assert_sampled(sampled, steered, frozen, temperature)


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["keep", "mask", "per_row"])
@SHAPES
def test_sampling_by_candidates_matches_the_definition(
    rows: int, vocabulary: int, tail: str
) -> None:
    logits = cases.logits(rows, vocabulary)
    row_tail = torch.arange(rows) % 2 == 0
    candidates = cases.candidates(logits, 20, 3, row_tail if tail == "per_row" else tail)
    beta, sampling = cases.strengths(rows, 3), cases.sampling(rows)
    temperature = sampling["temperature"]
    sampled = value_reweight(logits, candidates, beta, **sampling)
    steered, frozen = float64.distributions(logits, candidates, beta, temperature)
    float64.assert_sampled(sampled, steered, frozen, temperature)
    reweighted = reweight_logits(
        logits, candidates.token_ids, candidates.values, beta, candidates.tail
    )
    expected, _ = float64.distributions(logits, candidates, beta, torch.ones(rows))
    np.testing.assert_allclose(float64.clean(reweighted.double().numpy()), expected, atol=2e-5)


def test_a_logit_of_minus_infinity_forbids_its_token() -> None:
    rows, vocabulary = 7, 1003
    logits, head = cases.logits(rows, vocabulary), cases.head(rows, vocabulary, 16, 1)
    cases.forbid(logits)
    beta, sampling = cases.strengths(rows, 1), cases.sampling(rows)
    temperature = sampling["temperature"]
    sampled = value_reweight(logits, head, beta, **sampling)
    steered, frozen = float64.distributions(logits, head, beta, temperature)
    float64.assert_sampled(sampled, steered, frozen, temperature)
    assert sampled.token[3] == -1
    assert sampled.logprob[3] == -INF


def test_candidate_values_are_those_of_the_whole_head() -> None:
    head = cases.head(5, 300, 32, 2)
    assert head.bias is not None
    ids = torch.randint(0, 300, (5, 9))
    all_values = torch.einsum("bmr,mvr->mbv", head.hidden, head.weight) + head.bias[:, None]
    expected = all_values.gather(2, ids.expand(2, 5, 9))
    values = candidate_values(ids, head.hidden, head.weight, head.bias)
    torch.testing.assert_close(values, expected)


def test_an_empty_batch_has_no_candidate_values() -> None:
    head = cases.head(0, 300, 32, 2)
    ids = torch.zeros(0, 9, dtype=torch.int64)
    assert candidate_values(ids, head.hidden, head.weight, head.bias).shape == (2, 0, 9)


def test_a_row_that_does_not_steer_is_the_frozen_model_bit_for_bit() -> None:
    logits = cases.logits(4, 500, torch.float16)
    ids = torch.arange(10).expand(4, 10)
    broken = torch.tensor([NAN, INF, -INF]).repeat(4)[:10].expand(2, 4, 10)
    beta = torch.zeros(4, 2)
    for tail in ("keep", "mask"):
        out = reweight_logits(logits, ids, broken, beta, tail)
        assert torch.equal(out.view(torch.int32), logits.float().view(torch.int32))
    sampling = cases.sampling(4)
    frozen = value_reweight(logits, CandidateValues(ids, broken), beta, **sampling)
    head = HeadValues(torch.full((4, 2, 16), NAN), torch.full((2, 500, 16), INF))
    for values in (head, CandidateValues(ids, broken, "mask")):
        sampled = value_reweight(logits, values, beta, **sampling)
        assert torch.equal(frozen.token, sampled.token)
        assert torch.equal(frozen.logprob, sampled.logprob)
        assert torch.equal(sampled.logprob, sampled.frozen_logprob)


def test_a_value_with_beta_zero_is_ignored() -> None:
    logits = torch.randn(1, 50)
    finite = torch.randn(1, 1, 5)
    both = torch.cat([finite, torch.full_like(finite, NAN)])
    ids = torch.arange(5)[None]
    expected = reweight_logits(logits, ids, finite, torch.tensor([[2.0]]))
    assert torch.equal(reweight_logits(logits, ids, both, torch.tensor([[2.0, 0.0]])), expected)


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = cases.logits(9, 1003)
    candidates = cases.candidates(logits, 8, 2)
    beta, sampling = cases.strengths(9, 2), cases.sampling(9)
    together = value_reweight(logits, candidates, beta, **sampling)
    for b in range(9):
        rows = slice(b, b + 1)
        row_candidates = CandidateValues(candidates.token_ids[rows], candidates.values[:, rows])
        row_sampling = cases.select_rows(sampling, rows)
        alone = value_reweight(logits[rows], row_candidates, beta[rows], **row_sampling)
        for field in fields(Sampled):
            assert torch.equal(getattr(alone, field.name), getattr(together, field.name)[rows])


def test_a_draw_by_a_head_does_not_depend_on_the_batch() -> None:
    # The matrix product rounds by the shape of the batch on CPU; the token is the same.
    logits, head = cases.logits(9, 1003), cases.head(9, 1003, 32, 2)
    beta, sampling = cases.strengths(9, 2), cases.sampling(9)
    together = value_reweight(logits, head, beta, **sampling)
    rows = slice(4, 5)
    row_head = HeadValues(head.hidden[rows], head.weight, head.bias)
    row_sampling = cases.select_rows(sampling, rows)
    alone = value_reweight(logits[rows], row_head, beta[rows], **row_sampling)
    assert torch.equal(alone.token, together.token[rows])


def test_a_slot_with_a_masked_logit_counts_in_the_mean() -> None:
    out = reweight_logits(
        torch.tensor([[-INF, 1.0, 2.0]]),
        torch.tensor([[0, 1, 2]]),
        torch.tensor([[[3.0, 6.0, 0.0]]]),
        torch.tensor([[0.5]]),
    )
    assert out.tolist() == [[-INF, 2.5, 0.5]]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_candidate_without_a_finite_value_is_dropped_and_does_not_count(bad: float) -> None:
    out = reweight_logits(
        torch.zeros(1, 4),
        torch.tensor([[0, 1, 2]]),
        torch.tensor([[[bad, 4.0, 2.0]]]),
        torch.tensor([[1.0]]),
    )
    assert out.tolist() == [[-INF, 1.0, -1.0, 0.0]]


def test_nan_is_never_chosen() -> None:
    assert sample_one_row([NAN, 1.0, NAN]).token.item() == 1


def test_an_infinite_logit_is_certain() -> None:
    sampled = sample_one_row([0.0, INF, 0.0])
    assert sampled.token.item() == 1
    assert sampled.logprob.item() == 0.0


def test_a_row_without_a_finite_logit_has_no_token() -> None:
    sampled = sample_one_row([-INF, NAN, -INF])
    assert sampled.token.item() == -1
    assert sampled.logsumexp.item() == -INF
    assert sampled.logprob.item() == -INF
    assert sampled.frozen_logprob.item() == -INF


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_greedy_row_takes_the_first_of_equal_logits(temperature: float) -> None:
    assert sample_one_row([1.0, 3.0, 3.0], temperature).token.item() == 1


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1e-38, 1e-45])
def test_a_very_low_temperature_takes_the_largest_logit(temperature: float) -> None:
    assert sample_one_row([1.0, 3.0, 2.0], temperature, uniform=0.9).token.item() == 1


def test_greedy_logprobs_have_temperature_one() -> None:
    sampled = sample_one_row([1.0, 3.0], temperature=0.0)
    assert sampled.logprob.item() == pytest.approx(-np.log1p(np.exp(-2.0)), abs=1e-6)


def test_reweighting_in_place_gives_the_same_logits() -> None:
    logits = cases.logits(5, 300)
    candidates = cases.candidates(logits, 6, 2, torch.arange(5) % 2 == 0)
    arguments = (candidates.token_ids, candidates.values, cases.strengths(5, 2), candidates.tail)
    expected = reweight_logits(logits, *arguments)
    in_place = logits.clone()
    assert reweight_logits(in_place, *arguments, out=in_place) is in_place
    assert torch.equal(in_place.nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))


def test_float64_logits_stay_float64() -> None:
    out = reweight_logits(
        torch.zeros(1, 3, dtype=torch.float64),
        torch.tensor([[0, 1]]),
        torch.tensor([[[0.0, 1.0]]], dtype=torch.float64),
        torch.ones(1, 1),
    )
    assert out.dtype == torch.float64
    assert out.tolist() == [[-0.5, 0.5, 0.0]]


def test_an_empty_batch_gives_an_empty_result() -> None:
    logits, head = cases.logits(0, 40), cases.head(0, 40, 16, 1)
    beta, sampling = torch.zeros(0, 1), cases.sampling(0)
    sampled = value_reweight(logits, head, beta, **sampling)
    assert sampled.token.shape == sampled.logprob.shape == (0,)
    candidates = CandidateValues(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(1, 0, 3))
    assert value_reweight(logits, candidates, beta, **sampling).token.shape == (0,)
    out = reweight_logits(logits, candidates.token_ids, candidates.values, beta)
    assert out.shape == (0, 40)


def chi_square_z(tokens: torch.Tensor, probabilities: np.ndarray, bins: int) -> float:
    """Return the z-score of Pearson's statistic; the rarest tokens share a bin."""
    order = np.argsort(-probabilities)
    counts = np.bincount(tokens.numpy(), minlength=len(probabilities))[order].astype(float)
    expected = probabilities[order] * len(tokens)
    counts = np.append(counts[:bins], counts[bins:].sum())
    expected = np.append(expected[:bins], expected[bins:].sum())
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float((statistic - bins) / np.sqrt(2 * bins))


@pytest.mark.slow
def test_the_sampler_follows_the_distribution() -> None:
    draws = 60_000
    row = torch.randn(1, 1300, generator=torch.Generator().manual_seed(1)) * 1.5
    head = cases.head(1, 1300, 16, 2)
    beta, temperature = torch.tensor([[1.0, -0.5]]), torch.tensor([0.8])
    steered, _ = float64.distributions(row, head, beta, temperature)
    probabilities = np.exp(steered[0] - float64.logsumexp(steered)[0])
    numbers = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tokens = []
    for part in torch.arange(draws).split(20_000):
        n = len(part)
        sampled = value_reweight(
            row.expand(n, -1),
            HeadValues(head.hidden.expand(n, -1, -1), head.weight, head.bias),
            beta.expand(n, -1),
            temperature=temperature.expand(n),
            uniform=numbers[part],
        )
        tokens.append(sampled.token)
    assert abs(chi_square_z(torch.cat(tokens), probabilities, 150)) < 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3)}, "logits: shape"),
        ({"logits": torch.zeros(2, 8, dtype=torch.int64)}, "logits: torch.int64"),
        ({"token_ids": torch.zeros(2, 0, dtype=torch.int64)}, "token_ids"),
        ({"token_ids": torch.zeros(2, 3, dtype=torch.int32)}, "token_ids"),
        ({"values": torch.zeros(1, 2, 4)}, "values: shape"),
        ({"beta": torch.zeros(2, 2)}, "beta: shape"),
        ({"tail": "drop"}, 'tail: .* must be "keep", "mask"'),
        ({"tail": torch.zeros(3, dtype=torch.bool)}, "tail: shape"),
        ({"tail": torch.zeros(2)}, "tail: torch.float32"),
        ({"out": torch.zeros(2, 9)}, "out"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.zeros(2, 8),
        "token_ids": torch.zeros(2, 3, dtype=torch.int64),
        "values": torch.zeros(1, 2, 3),
        "beta": torch.zeros(2, 1),
    }
    with pytest.raises(ValueError, match=message):
        reweight_logits(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": torch.ones(3)}, "temperature: shape"),
        ({"uniform": torch.zeros(2)}, r"uniform: torch\.float32"),
        ({"values": cases.head(2, 41, 16, 1)}, r"values.weight: shape"),
    ],
)
def test_a_sampling_argument_that_does_not_fit_is_named(
    change: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {
        "logits": cases.logits(2, 40),
        "values": cases.head(2, 40, 16, 1),
        "beta": torch.zeros(2, 1),
        **cases.sampling(2),
    }
    with pytest.raises(ValueError, match=message):
        value_reweight(**(arguments | change))


def test_the_exported_names_are_sorted_and_callable() -> None:
    assert kernels.__all__ == sorted(kernels.__all__)
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)
