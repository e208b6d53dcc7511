"""Value reweighting on CPU: the torch reference against float64, its rules for odd numbers, its sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import infer_align_kernels as kernels
from infer_align_kernels import (
    CandidateValues,
    HeadValues,
    add_candidate_shifts,
    reweight_logits,
    top_candidates,
    value_reweight,
)
from infer_align_kernels.value_reweight import reference
from tests.kernels import cases, float64

INF = torch.inf
AWKWARD = [(1, 32000), (3, 32001), (257, 1003), (3, 128256), (3, 151936)]


def one_row(
    logits: list[float],
    values: list[float],
    beta: float = 1.0,
    tail: str = "keep",
    **options: float,
) -> kernels.Sampled:
    """Every token a candidate."""
    given = CandidateValues(torch.arange(len(values))[None], torch.tensor(values)[None, None], tail)  # type: ignore[arg-type]
    return value_reweight(
        torch.tensor([logits]),
        given,
        torch.tensor([[beta]]),
        temperature=torch.tensor([options.get("temperature", 1.0)]),
        seed=torch.tensor([int(options.get("seed", 0))]),
        step=torch.tensor([0], dtype=torch.int32),
    )


def assert_right(
    got: kernels.Sampled, steered: np.ndarray, frozen: np.ndarray, temperature: torch.Tensor
) -> None:
    rows = np.arange(len(steered))
    token = got.token.numpy()
    for b in rows:
        if np.isneginf(steered[b]).all():
            assert token[b] == -1
        elif temperature[b] <= 0:
            assert steered[b, token[b]] >= steered[b].max() - 1e-5
        else:
            assert steered[b, token[b]] > -np.inf
    found = token >= 0
    np.testing.assert_allclose(
        got.logsumexp.numpy()[found], float64.logsumexp(steered)[found], rtol=1e-6, atol=1e-5
    )
    at = (rows[found], token[found])
    np.testing.assert_allclose(
        got.logprob.numpy()[found], (steered[at] - float64.logsumexp(steered)[found]), atol=2e-5
    )
    np.testing.assert_allclose(
        got.frozen_logprob.numpy()[found],
        (frozen[at] - float64.logsumexp(frozen)[found]),
        atol=2e-5,
    )


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize(("rows", "vocabulary"), AWKWARD)
def test_head(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    logits, head = cases.logits(rows, vocabulary, dtype), cases.head(rows, vocabulary, 48, 2, dtype)
    beta, sampling = cases.strengths(rows, 2), cases.sampling(rows)
    got = value_reweight(logits, head, beta, **sampling)
    assert_right(
        got,
        *float64.distributions(logits, head, beta, sampling["temperature"]),
        sampling["temperature"],
    )


@pytest.mark.parametrize("tail", ["keep", "mask", "per_row"])
@pytest.mark.parametrize(("rows", "vocabulary"), AWKWARD)
def test_candidates(rows: int, vocabulary: int, tail: str) -> None:
    logits = cases.logits(rows, vocabulary)
    given = cases.candidates(
        logits, 20, 3, torch.arange(rows) % 2 == 0 if tail == "per_row" else tail
    )
    beta, sampling = cases.strengths(rows, 3), cases.sampling(rows)
    got = value_reweight(logits, given, beta, **sampling)
    ones = torch.ones(rows)
    steered, _ = float64.distributions(logits, given, beta, ones)
    assert_right(
        got,
        *float64.distributions(logits, given, beta, sampling["temperature"]),
        sampling["temperature"],
    )
    reweighted = reweight_logits(logits, given.token_ids, given.values, beta, given.tail)
    np.testing.assert_allclose(float64.clean(reweighted.double().numpy()), steered, atol=2e-5)


def test_bitmask() -> None:
    rows, vocabulary = 7, 1003
    logits, head, mask = (
        cases.logits(rows, vocabulary),
        cases.head(rows, vocabulary, 16, 1),
        cases.bitmask(7, vocabulary),
    )
    mask[3] = 0
    beta, sampling = cases.strengths(rows, 1), cases.sampling(rows)
    got = value_reweight(logits, head, beta, **sampling, bitmask=mask)
    assert_right(
        got,
        *float64.distributions(logits, head, beta, sampling["temperature"], mask),
        sampling["temperature"],
    )
    assert got.token[3] == -1
    assert got.logprob[3] == -INF


def test_candidate_values_are_the_heads() -> None:
    head = cases.head(5, 300, 32, 2)
    ids = torch.randint(0, 300, (5, 9))
    dense = torch.einsum("bmr,mvr->mbv", head.hidden, head.weight) + head.bias[:, None]  # type: ignore[index]
    expected = dense.gather(2, ids.expand(2, 5, 9))
    torch.testing.assert_close(
        kernels.candidate_values(ids, head.hidden, head.weight, head.bias), expected
    )


def test_a_row_that_does_not_steer_is_the_frozen_model_bit_for_bit() -> None:
    logits = cases.logits(4, 500, torch.float16)
    ids = torch.arange(10).expand(4, 10)
    broken = torch.tensor([torch.nan, INF, -INF]).repeat(4)[:10].expand(2, 4, 10)
    for tail in ("keep", "mask"):
        out = reweight_logits(logits, ids, broken, torch.zeros(4, 2), tail)
        assert torch.equal(out.view(torch.int32), logits.float().view(torch.int32))
    sampling = cases.sampling(4)
    frozen = value_reweight(logits, CandidateValues(ids, broken), torch.zeros(4, 2), **sampling)
    head = HeadValues(torch.full((4, 2, 16), torch.nan), torch.full((2, 500, 16), INF))
    for other in (
        value_reweight(logits, head, torch.zeros(4, 2), **sampling),
        value_reweight(logits, CandidateValues(ids, broken, "mask"), torch.zeros(4, 2), **sampling),
    ):
        assert torch.equal(frozen.token, other.token)
        assert torch.equal(frozen.logprob, other.logprob)
        assert torch.equal(other.logprob, other.frozen_logprob)


def test_one_value_with_beta_zero_is_not_looked_at() -> None:
    logits = torch.randn(1, 50)
    good = torch.randn(1, 1, 5)
    bad = torch.full_like(good, torch.nan)
    ids = torch.arange(5)[None]
    both = reweight_logits(logits, ids, torch.cat([good, bad]), torch.tensor([[2.0, 0.0]]))
    assert torch.equal(both, reweight_logits(logits, ids, good, torch.tensor([[2.0]])))


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits, head = cases.logits(9, 1003), cases.head(9, 1003, 32, 2)
    given = cases.candidates(logits, 8, 2)
    beta, sampling = cases.strengths(9, 2), cases.sampling(9)
    all_rows = value_reweight(logits, given, beta, **sampling)
    for b in range(9):
        rows = slice(b, b + 1)
        alone = value_reweight(
            logits[rows],
            CandidateValues(given.token_ids[rows], given.values[:, rows]),
            beta[rows],
            **{k: v[rows] for k, v in sampling.items()},
        )
        assert all(
            torch.equal(getattr(alone, f), getattr(all_rows, f)[rows])
            for f in ("token", "logsumexp", "logprob", "frozen_logprob")
        )
    # The matrix product of the dense form rounds by the shape of the batch on CPU; the draw must not.
    dense = value_reweight(logits, head, beta, **sampling)
    alone = value_reweight(
        logits[4:5],
        HeadValues(head.hidden[4:5], head.weight, head.bias),
        beta[4:5],
        **{k: v[4:5] for k, v in sampling.items()},
    )
    assert torch.equal(alone.token, dense.token[4:5])


def test_the_published_mean_counts_a_slot_whose_logit_is_masked() -> None:
    out = reweight_logits(
        torch.tensor([[-INF, 1.0, 2.0]]),
        torch.tensor([[0, 1, 2]]),
        torch.tensor([[[3.0, 6.0, 0.0]]]),
        torch.tensor([[0.5]]),
    )
    assert out.tolist() == [[-INF, 2.5, 0.5]]


def test_a_candidate_without_a_finite_value_is_dropped_and_not_counted() -> None:
    for bad in (torch.nan, INF, -INF):
        out = reweight_logits(
            torch.zeros(1, 4),
            torch.tensor([[0, 1, 2]]),
            torch.tensor([[[bad, 4.0, 2.0]]]),
            torch.tensor([[1.0]]),
        )
        assert out.tolist() == [[-INF, 1.0, -1.0, 0.0]]


def test_odd_logits() -> None:
    zeros = [0.0, 0.0, 0.0]
    assert one_row([torch.nan, 1.0, torch.nan], zeros).token.item() == 1
    infinite = one_row([0.0, INF, 0.0], zeros)
    assert infinite.token.item() == 1
    assert infinite.logprob.item() == 0.0
    nothing = one_row([-INF, torch.nan, -INF], zeros)
    assert (
        nothing.token.item(),
        nothing.logsumexp.item(),
        nothing.logprob.item(),
        nothing.frozen_logprob.item(),
    ) == (
        -1,
        -INF,
        -INF,
        -INF,
    )
    for temperature in (0.0, -1.0, 1e-38, 1e-45):
        assert (
            one_row(
                [1.0, 3.0, 3.0], zeros, temperature=0.0 if temperature > 0 else temperature
            ).token.item()
            == 1
        )
        assert one_row([1.0, 3.0, 2.0], zeros, temperature=temperature, seed=5).token.item() == 1


def test_greedy_logprobs_are_those_of_temperature_one() -> None:
    got = one_row([1.0, 3.0], [0.0, 0.0], temperature=0.0)
    assert got.logprob.item() == pytest.approx(-np.log1p(np.exp(-2.0)), abs=1e-6)


def test_in_place_is_the_same() -> None:
    logits = cases.logits(5, 300)
    given = cases.candidates(logits, 6, 2, torch.arange(5) % 2 == 0)
    beta = cases.strengths(5, 2)
    expected = reweight_logits(logits, given.token_ids, given.values, beta, given.tail)
    mine = logits.clone()
    assert reweight_logits(mine, given.token_ids, given.values, beta, given.tail, out=mine) is mine
    assert torch.equal(mine.nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))


@pytest.mark.parametrize("values", [1, 3])
def test_unchecked_shifts_are_the_reweighted_logits_bit_for_bit(values: int) -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    token_ids = top_candidates(logits, 6)
    scored = torch.randn(values, 5, 6, generator=torch.Generator().manual_seed(1)) + 50
    beta = torch.randn(5, values, generator=torch.Generator().manual_seed(2))
    expected = reweight_logits(logits, token_ids, scored, beta)
    in_place = logits.clone()
    assert add_candidate_shifts(in_place, token_ids, scored, beta) is in_place
    assert torch.equal(in_place, expected)


def test_float64_logits_stay_float64() -> None:
    out = reweight_logits(
        torch.zeros(1, 3, dtype=torch.float64),
        torch.tensor([[0, 1]]),
        torch.tensor([[[0.0, 1.0]]], dtype=torch.float64),
        torch.ones(1, 1),
    )
    assert out.dtype == torch.float64
    assert out.tolist() == [[-0.5, 0.5, 0.0]]


def test_no_rows() -> None:
    empty = cases.logits(0, 40)
    got = value_reweight(empty, cases.head(0, 40, 16, 1), torch.zeros(0, 1), **cases.sampling(0))
    assert got.token.shape == got.logprob.shape == (0,)
    given = CandidateValues(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(1, 0, 3))
    assert value_reweight(empty, given, torch.zeros(0, 1), **cases.sampling(0)).token.shape == (0,)
    assert reweight_logits(empty, given.token_ids, given.values, torch.zeros(0, 1)).shape == (0, 40)


@pytest.mark.parametrize("greedy", [False, True])
def test_top_candidates_take_the_lowest_of_equals(*, greedy: bool) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3 if greedy else 40, (50, 200), generator=g).float()
    logits[0] = -INF
    logits[1, :150] = torch.nan
    expected = (
        logits.nan_to_num(nan=-INF, neginf=-INF).sort(dim=1, descending=True, stable=True).indices
    )
    for k in (1, 7, 199, 200):
        assert torch.equal(top_candidates(logits, k), expected[:, :k])
        assert torch.equal(reference.top_candidates_by_key(logits, k), expected[:, :k])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_top_candidates_by_key_are_those_of_the_reference(dtype: torch.dtype) -> None:
    logits = cases.logits(40, 3001, dtype)
    logits[3, :5] = torch.tensor([0.0, -0.0, INF, -INF, torch.nan], dtype=dtype)
    logits[4].clamp_(-0.05, 0.05)
    for k in (1, 20, 3001):
        assert torch.equal(reference.top_candidates_by_key(logits, k), top_candidates(logits, k))


def chi_square(tokens: torch.Tensor, probabilities: np.ndarray, bins: int) -> float:
    """z-score of Pearson's statistic; the rarest tokens share a bin."""
    order = np.argsort(-probabilities)
    counts = np.bincount(tokens.numpy(), minlength=len(probabilities))[order].astype(float)
    expected = probabilities[order] * len(tokens)
    counts = np.append(counts[:bins], counts[bins:].sum())
    expected = np.append(expected[:bins], expected[bins:].sum())
    return float((((counts - expected) ** 2 / expected).sum() - bins) / np.sqrt(2 * bins))


def test_the_sampler_follows_the_distribution() -> None:
    draws = 60_000
    row, head = (
        torch.randn(1, 1300, generator=torch.Generator().manual_seed(1)) * 1.5,
        cases.head(1, 1300, 16, 2),
    )
    beta, heat = torch.tensor([[1.0, -0.5]]), torch.tensor([0.8])
    steered, _ = float64.distributions(row, head, beta, heat)
    probabilities = np.exp(steered[0] - float64.logsumexp(steered)[0])
    seeds, steps = torch.arange(draws) // 2, torch.arange(draws, dtype=torch.int32) % 2
    tokens = []
    for part in torch.arange(draws).split(20_000):
        n = len(part)
        many = HeadValues(head.hidden.expand(n, -1, -1), head.weight, head.bias)
        tokens.append(
            value_reweight(
                row.expand(n, -1),
                many,
                beta.expand(n, -1),
                temperature=heat.expand(n),
                seed=seeds[part],
                step=steps[part],
            ).token
        )
    assert abs(chi_square(torch.cat(tokens), probabilities, 150)) < 4


def test_the_numbers_are_uniform_and_their_own() -> None:
    numbers = reference.uniforms(
        torch.arange(20_000), torch.zeros(20_000, dtype=torch.int32)
    ).numpy()
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert abs(((counts - 200) ** 2 / 200).sum() - 99) < 4 * np.sqrt(198)
    assert len(np.unique(numbers)) == 20_000
    again = reference.uniforms(torch.tensor([3, 3, -3]), torch.tensor([0, 1, 0]))
    assert again[0] == numbers[3]
    assert len(set(again.tolist())) == 3


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
def test_what_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    given = {
        "logits": torch.zeros(2, 8),
        "token_ids": torch.zeros(2, 3, dtype=torch.int64),
        "values": torch.zeros(1, 2, 3),
        "beta": torch.zeros(2, 1),
    }
    with pytest.raises(ValueError, match=message):
        reweight_logits(**(given | change))  # type: ignore[arg-type]


def test_sampling_arguments_that_do_not_fit_are_named() -> None:
    logits, head, beta = cases.logits(2, 40), cases.head(2, 40, 16, 1), torch.zeros(2, 1)
    with pytest.raises(ValueError, match="temperature: shape"):
        value_reweight(logits, head, beta, **(cases.sampling(2) | {"temperature": torch.ones(3)}))
    with pytest.raises(ValueError, match=r"bitmask: torch.int64"):
        value_reweight(
            logits, head, beta, **cases.sampling(2), bitmask=torch.zeros(2, 2, dtype=torch.int64)
        )
    with pytest.raises(ValueError, match=r"values.weight: shape"):
        value_reweight(logits, cases.head(2, 41, 16, 1), beta, **cases.sampling(2))
    with pytest.raises(ValueError, match="k: 41"):
        top_candidates(logits, 41)


def test_what_is_exported() -> None:
    assert kernels.__all__ == sorted(kernels.__all__)
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)
