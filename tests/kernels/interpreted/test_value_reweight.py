"""Test the Triton code of value reweighting, interpreted, against float64 and the reference."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from infer_align_kernels import (
    CandidateValues,
    HeadValues,
    Sampled,
    reweight_logits,
    value_reweight,
)
from infer_align_kernels.value_reweight import MAX_SLOTS, reference, triton
from tests.kernels import cases, float64
from tests.kernels.cases import DTYPES

TAILS: dict[str, Any] = {
    "keep": "keep",
    "mask": "mask",
    "per_row": torch.tensor([True, False, True, True]),
}


def run(
    logits: torch.Tensor,
    values: HeadValues | CandidateValues,
    beta: torch.Tensor,
    **sampling: torch.Tensor,
) -> Sampled:
    return triton.value_reweight(logits, values, beta, **sampling)


def assert_correct(
    sampled: Sampled,
    logits: torch.Tensor,
    values: HeadValues | CandidateValues,
    beta: torch.Tensor,
    sampling: dict[str, torch.Tensor],
) -> None:
    temperature = sampling["temperature"]
    steered, frozen = float64.distributions(logits, values, beta, temperature)
    float64.assert_sampled(sampled, steered, frozen, temperature)
    expected = reference.value_reweight(logits, values, beta, **sampling)
    assert sampled.token.tolist() == expected.token.tolist()


# Rows and vocabularies around the tile sizes; ranks below, at and above one step of the product.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 127, 16, 1), torch.float32),
        ((3, 700, 48, 2), torch.float32),
        ((3, 700, 48, 2), torch.bfloat16),
        ((3, 129, 144, 3), torch.float16),
        # More rows than are multiplied at once, by a part of the head that is loaded once and not.
        ((66, 130, 24, 1), torch.float32),
        ((66, 130, 24, 1), torch.bfloat16),
        ((66, 70, 144, 1), torch.float32),
    ],
    ids=str,
)
def test_sampling_by_a_head_matches_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    rows, vocabulary, rank, values = shape
    logits = cases.logits(rows, vocabulary, dtype)
    head = cases.head(rows, vocabulary, rank, values, dtype)
    beta, sampling = cases.strengths(rows, values), cases.sampling(rows)
    assert_correct(run(logits, head, beta, **sampling), logits, head, beta, sampling)
    cases.forbid(logits)
    no_bias = HeadValues(head.hidden, head.weight)
    assert_correct(run(logits, no_bias, beta, **sampling), logits, no_bias, beta, sampling)


@pytest.mark.parametrize(
    ("tail", "dtype"),
    [("keep", torch.float32), ("mask", torch.bfloat16), ("per_row", torch.float16)],
)
def test_sampling_by_candidates_matches_the_definition(tail: str, dtype: torch.dtype) -> None:
    # Two groups of tiles, and a number of candidates that is not a power of two.
    logits = cases.logits(4, 4500, dtype)
    candidates = cases.candidates(logits, 9, 2, TAILS[tail])
    beta, sampling = cases.strengths(4, 2), cases.sampling(4)
    assert_correct(run(logits, candidates, beta, **sampling), logits, candidates, beta, sampling)
    cases.forbid(logits)
    assert_correct(run(logits, candidates, beta, **sampling), logits, candidates, beta, sampling)


@pytest.mark.parametrize("tail", TAILS)
def test_reweighted_logits_match_the_reference(tail: str) -> None:
    logits = cases.logits(4, 2500)
    candidates = cases.candidates(logits, 9, 2, TAILS[tail])
    beta = cases.strengths(4, 2)
    arguments = (candidates.token_ids, candidates.values, beta, candidates.tail)
    expected = reference.reweight_logits(logits, *arguments, out=None)
    result = triton.reweight_logits(logits, *arguments, out=None)
    # The values are around 50 and are centred in float32.
    torch.testing.assert_close(result, expected, equal_nan=True, atol=2e-5, rtol=1e-6)
    assert torch.equal(result[2].view(torch.int32), logits[2].view(torch.int32))
    in_place = logits.clone()
    triton.reweight_logits(in_place, *arguments, out=in_place)
    assert torch.equal(in_place.nan_to_num(nan=9.0), result.nan_to_num(nan=9.0))


def test_many_candidates_in_several_tiles_are_all_found() -> None:
    # The candidates of a row are looked for 32 at a time, in groups of 4,096 tokens.
    logits = cases.logits(4, 9000)
    candidates = cases.candidates(logits, 70, 2)
    beta, sampling = cases.strengths(4, 2), cases.sampling(4)
    assert_correct(run(logits, candidates, beta, **sampling), logits, candidates, beta, sampling)


@pytest.mark.parametrize("tail", TAILS)
def test_every_token_of_a_tile_may_be_a_candidate(tail: str) -> None:
    # The first tile has 512 tokens. Then it has no other token, and its own sum is 0.
    logits = cases.logits(4, 600)
    values = torch.randn((1, 4, 520), generator=torch.Generator().manual_seed(7))
    candidates = CandidateValues(torch.arange(520).expand(4, -1), values, TAILS[tail])
    beta, sampling = cases.strengths(4, 1), cases.sampling(4)
    assert_correct(run(logits, candidates, beta, **sampling), logits, candidates, beta, sampling)


def test_a_row_is_drawn_evenly_from_its_tiles_and_candidates() -> None:
    """Numbers that are evenly spread give each token as many draws as its probability."""
    draws, vocabulary = 80, 1100
    row = torch.full((1, vocabulary), -torch.inf)
    # Candidates and other tokens, side by side and at both ends of tiles of 512 tokens.
    tokens = torch.tensor([0, 1, 510, 511, 512, 513, 1023, 1024, 1098, 1099])
    row[0, tokens] = torch.linspace(-1, 1, 10)
    ids = tokens[::2].expand(draws, -1)
    values = torch.tensor([[-2.0, 1.0, 0.0, 2.0, -1.0]]).expand(1, draws, -1)
    candidates = CandidateValues(ids, values)
    beta, temperature = torch.ones(draws, 1), torch.full((draws,), 0.9)
    logits = row.expand(draws, -1)
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    sampled = run(logits, candidates, beta, temperature=temperature, uniform=uniform)
    steered, _ = float64.distributions(logits[:1], candidates, beta, temperature)
    expected = np.exp(steered[0] - float64.logsumexp(steered)[0]) * draws
    counts = np.bincount(sampled.token.numpy(), minlength=vocabulary)
    assert np.abs(counts - expected).max() <= 1


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_a_float32_head_of_any_magnitude_keeps_its_precision(magnitude: float) -> None:
    # Features of one row differ in magnitude too, as those of one token of the head.
    head = cases.head(5, 200, 128, 1)
    spread = 10.0 ** torch.linspace(-3, 3, 128)
    hidden = head.hidden[:, 0] * magnitude * spread.flip(0)
    weight = head.weight[0] / magnitude * spread
    hidden[3] = 0
    weight[7] = 0
    logits = torch.zeros(5, 200)
    triton.add_head_values(logits, hidden, weight, None, torch.ones(5), None)
    expected = hidden.double() @ weight.double().T
    scale = hidden.double().abs() @ weight.double().abs().T
    error = (logits.double() - expected).abs()
    assert (error <= scale * 2.0**-21).all()


def test_more_candidates_than_a_program_holds_are_left_to_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The kernel of so many takes minutes to compile on a GPU. The interpreter would not show that.
    launched: list[tuple[str, int]] = []
    reweight, draw = triton.reweight_logits, triton.value_reweight

    def count_reweight(logits: torch.Tensor, ids: torch.Tensor, *arguments: Any) -> torch.Tensor:
        launched.append(("reweight", ids.shape[1]))
        return reweight(logits, ids, *arguments)

    def count_draw(logits: torch.Tensor, values: CandidateValues, *arguments: Any) -> Sampled:
        launched.append(("draw", values.token_ids.shape[1]))
        return draw(logits, values, *arguments)

    monkeypatch.setattr(triton, "reweight_logits", count_reweight)
    monkeypatch.setattr(triton, "value_reweight", count_draw)
    logits = cases.logits(2, MAX_SLOTS + 20)
    beta, sampling = cases.strengths(2, 1), cases.sampling(2)
    for k in (64, MAX_SLOTS + 1):
        candidates = cases.candidates(logits, k, 1)
        arguments = (candidates.token_ids, candidates.values, beta)
        expected = reference.reweight_logits(logits, *arguments, "keep", out=None)
        steered = reweight_logits(logits, *arguments)
        torch.testing.assert_close(steered, expected, equal_nan=True, atol=1e-5, rtol=1e-6)
        drawn = value_reweight(logits, candidates, beta, **sampling)
        assert_correct(drawn, logits, candidates, beta, sampling)
    assert launched == [("reweight", 64), ("draw", 64)]


@DTYPES
def test_candidate_values_match_the_reference(dtype: torch.dtype) -> None:
    head = cases.head(3, 300, 144, 2, dtype)
    arguments = (torch.randint(0, 300, (3, 17)), head.hidden, head.weight, head.bias)
    result = triton.candidate_values(*arguments)
    expected = reference.candidate_values(*arguments)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_row_that_does_not_steer_is_the_frozen_model_bit_for_bit() -> None:
    logits, sampling = cases.logits(3, 200), cases.sampling(3)
    beta = torch.zeros(3, 2)
    head = HeadValues(torch.full((3, 2, 16), torch.nan), torch.full((2, 200, 16), torch.inf))
    ids = torch.arange(5).expand(3, 5)
    candidates = CandidateValues(ids, torch.full((2, 3, 5), torch.nan), "mask")
    for values in (head, candidates):
        sampled = run(logits, values, beta, **sampling)
        assert torch.equal(sampled.logprob, sampled.frozen_logprob)
        assert_correct(sampled, logits, values, beta, sampling)


def test_a_row_does_not_depend_on_its_batch() -> None:
    # More rows than are multiplied at once.
    count = 66
    logits, head = cases.logits(count, 300), cases.head(count, 300, 32, 2)
    candidates = cases.candidates(logits, 8, 2)
    beta, sampling = cases.strengths(count, 2), cases.sampling(count)
    by_head = run(logits, head, beta, **sampling)
    by_candidates = run(logits, candidates, beta, **sampling)
    for b in (0, 2, 63, 64, 65):
        rows = slice(b, b + 1)
        row_sampling = cases.select_rows(sampling, rows)
        row_head = HeadValues(head.hidden[rows], head.weight, head.bias)
        row_candidates = CandidateValues(candidates.token_ids[rows], candidates.values[:, rows])
        alone_by_head = run(logits[rows], row_head, beta[rows], **row_sampling)
        alone_by_candidates = run(logits[rows], row_candidates, beta[rows], **row_sampling)
        for field in fields(Sampled):
            name = field.name
            assert torch.equal(getattr(alone_by_head, name), getattr(by_head, name)[rows])
            together = getattr(by_candidates, name)[rows]
            assert torch.equal(getattr(alone_by_candidates, name), together)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_nan_and_infinite_logits_follow_the_rules() -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [[nan, 1.0, nan, 1.0], [0.0, inf, 0.0, inf], [-inf, nan, -inf, nan], [1.0, 3.0, 3.0, 0.0]]
    )
    sampling = cases.sampling(4) | {"temperature": torch.tensor([0.0, 1e-45, 1.0, -1.0])}
    candidates = CandidateValues(torch.arange(4).expand(4, 4), torch.zeros(1, 4, 4))
    head = HeadValues(torch.zeros(4, 1, 16), torch.zeros(1, 4, 16))
    for values in (candidates, head):
        sampled = run(logits, values, torch.ones(4, 1), **sampling)
        tokens = sampled.token.tolist()
        assert tokens[0] == 1
        assert tokens[1] in {1, 3}
        assert tokens[2:] == [-1, 1]
        assert sampled.logprob[2] == -inf


def test_an_empty_batch_gives_an_empty_result() -> None:
    head = cases.head(0, 40, 16, 1)
    sampled = run(cases.logits(0, 40), head, torch.zeros(0, 1), **cases.sampling(0))
    assert sampled.token.shape == sampled.logprob.shape == (0,)


@pytest.mark.slow
def test_the_sampler_follows_the_distribution() -> None:
    """The sampler inverts the distribution, so numbers that are evenly spread give even counts.

    They show a wrong probability better than four times as many random numbers. The test of the
    reference draws many tokens at random.
    """
    draws, vocabulary = 100, 40
    generator = torch.Generator().manual_seed(6)
    row = torch.randn(1, vocabulary, generator=generator)
    head = cases.head(1, vocabulary, 16, 1)
    beta, temperature = torch.ones(1, 1), torch.tensor([0.9])
    steered, _ = float64.distributions(row, head, beta, temperature)
    expected = np.exp(steered[0] - float64.logsumexp(steered)[0]) * draws
    sampled = run(
        row.expand(draws, -1),
        HeadValues(head.hidden.expand(draws, -1, -1), head.weight, head.bias),
        beta.expand(draws, -1),
        temperature=temperature.expand(draws),
        uniform=(torch.arange(draws, dtype=torch.float64) + 0.5) / draws,
    )
    counts = np.bincount(sampled.token.numpy(), minlength=vocabulary)
    # A token has one interval of numbers, at whose ends it may gain or lose one.
    assert np.abs(counts - expected).max() <= 1


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 127, 16), torch.float32),
        ((5, 700, 48), torch.bfloat16),
        ((3, 129, 144), torch.float16),
        ((70, 200, 20), torch.float32),
    ],
    ids=str,
)
def test_a_heads_values_of_every_token_are_added_in_place(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    rows, vocabulary, rank = shape
    head = cases.head(rows, vocabulary, rank, 1, dtype)
    beta = cases.strengths(rows, 1)[:, 0]
    # Twice as many rows of logits, of which every second one is steered, in another order.
    indices = torch.arange(rows).flip(0) * 2
    logits = cases.logits(2 * rows, vocabulary)
    before = logits.clone()
    bias = None if head.bias is None else head.bias[0]
    arguments = (head.hidden[:, 0], head.weight[0], bias, beta, indices)
    result = triton.add_head_values(logits, *arguments)
    assert result is logits
    values = head.hidden[:, 0].double() @ head.weight[0].double().T
    if bias is not None:
        values = values + bias.double()
    expected = before.double()
    expected[indices] += beta.double()[:, None] * values
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=1e-4, equal_nan=True)
    # Rows that are not steered, or with a beta of 0, stay bit for bit the same.
    steered = indices[beta != 0]
    unsteered = [row for row in range(2 * rows) if row not in steered.tolist()]
    torch.testing.assert_close(logits[unsteered], before[unsteered], rtol=0, atol=0, equal_nan=True)
    again = reference.add_head_values(before.clone(), *arguments)
    torch.testing.assert_close(again, logits, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_a_heads_values_without_indices_or_bias() -> None:
    head = cases.head(3, 150, 32, 1)
    logits = cases.logits(3, 150)
    before = logits.clone()
    arguments = (head.hidden[:, 0], head.weight[0], None, torch.ones(3), None)
    triton.add_head_values(logits, *arguments)
    expected = before + head.hidden[:, 0] @ head.weight[0].T
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4, equal_nan=True)
    again = reference.add_head_values(before, *arguments)
    assert again is before
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4, equal_nan=True)
