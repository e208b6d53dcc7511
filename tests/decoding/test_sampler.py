"""Tests of the sampler against softmax and the warpers of transformers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from infer_align.decoding.params import SamplingParams
from infer_align.decoding.sampler import adjust, sample, sample_at, truncate, uniforms

VOCABULARY = 24


@dataclass
class Row:
    params: SamplingParams
    seed: int = 0
    tokens: list[int] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    banned: frozenset[int] = frozenset()


def draw(logits: torch.Tensor, rows: list[Row]) -> list[int]:
    return sample(adjust(logits, rows), rows)


@pytest.fixture
def logits(device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn((1, VOCABULARY), generator=generator).to(device) * 2


def frequencies(logits: torch.Tensor, n: int = 20_000, **params: Any) -> np.ndarray:
    rows = [Row(SamplingParams(**params), seed=i) for i in range(n)]
    return np.bincount(draw(logits.expand(n, -1), rows), minlength=logits.shape[-1])


def agree(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Test the fit by chi-square, with its normal approximation at five standard deviations."""
    assert counts[expected == 0].sum() == 0, "a token of probability 0 was sampled"
    expected, counts = expected[expected > 0] * counts.sum(), counts[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = max(1, len(counts) - 1)
    return bool(statistic < freedom + 5 * np.sqrt(2 * freedom))


WARPERS = [
    ({}, []),
    ({"temperature": 0.5}, [hf.TemperatureLogitsWarper(0.5)]),
    ({"temperature": 1.7}, [hf.TemperatureLogitsWarper(1.7)]),
    ({"top_k": 1}, [hf.TopKLogitsWarper(1)]),
    ({"top_k": 5}, [hf.TopKLogitsWarper(5)]),
    ({"top_k": 1000}, []),
    ({"top_k": -1}, []),
    ({"top_p": 0.01}, [hf.TopPLogitsWarper(0.01)]),
    ({"top_p": 0.7}, [hf.TopPLogitsWarper(0.7)]),
    ({"top_p": 0.95}, [hf.TopPLogitsWarper(0.95)]),
    ({"min_p": 0.1}, [hf.MinPLogitsWarper(0.1)]),
    ({"min_p": 1.0}, [hf.MinPLogitsWarper(1.0)]),
    (
        {"temperature": 1.3, "min_p": 0.02, "top_k": 9, "top_p": 0.8},
        [
            hf.TemperatureLogitsWarper(1.3),
            hf.MinPLogitsWarper(0.02),
            hf.TopKLogitsWarper(9),
            hf.TopPLogitsWarper(0.8),
        ],
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("params", "warpers"), WARPERS, ids=lambda v: str(v) if isinstance(v, dict) else ""
)
def test_the_distribution_is_that_of_the_warpers_of_transformers(logits, params, warpers):
    warped = logits
    for warper in warpers:
        warped = warper(None, warped)
    assert agree(frequencies(logits, **params), warped[0].softmax(-1).double().cpu().numpy())


@pytest.mark.slow
def test_the_check_itself_can_fail(logits):
    assert not agree(
        frequencies(logits, temperature=1.1), logits[0].softmax(-1).double().cpu().numpy()
    )


def test_truncation_keeps_exactly_what_the_warpers_keep(device):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        logits = torch.randn((1, VOCABULARY), generator=generator).to(device) * 3
        for params, warpers in WARPERS[3:12]:
            warped = logits
            for warper in warpers:
                warped = warper(None, warped)
            assert torch.equal(truncate(logits, [SamplingParams(**params)]), warped), params


def test_rows_do_not_depend_on_each_other(logits):
    kinds = [
        {},
        {"temperature": 0.0},
        {"top_k": 3},
        {"top_p": 0.5},
        {"logit_bias": {1: 5.0}},
        {"min_p": 0.3, "temperature": 2.0},
    ]
    rows = [
        Row(SamplingParams(**kinds[i % len(kinds)]), seed=i, tokens=[2] * (i % 5))
        for i in range(60)
    ]
    together = draw(logits.expand(60, -1), rows)
    assert together == [draw(logits, [row])[0] for row in rows]


def test_temperature_zero_takes_the_largest_logit_and_the_first_of_equal_ones(device):
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]], device=device)
    assert draw(logits, [Row(SamplingParams(temperature=0.0))]) == [1]
    assert draw(logits, [Row(SamplingParams(temperature=1e-9))])[0] in {1, 2}


def test_the_random_number_depends_on_seed_and_step_alone():
    seeds, steps = np.meshgrid(np.arange(300), np.arange(300))
    numbers = uniforms(seeds.ravel().tolist(), steps.ravel().tolist())
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert len(np.unique(numbers)) == numbers.size
    assert agree(np.histogram(numbers, 50, (0, 1))[0], np.full(50, 0.02))
    grid = numbers.reshape(300, 300)
    # Neighbours in seed or step are not correlated.
    for shifted in (grid[1:] - grid[:-1], grid[:, 1:] - grid[:, :-1]):
        assert abs(np.corrcoef(shifted.ravel()[:-1], shifted.ravel()[1:])[0, 1]) < 0.6
    assert abs(np.corrcoef(grid[1:].ravel(), grid[:-1].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(grid[:, 1:].ravel(), grid[:, :-1].ravel())[0, 1]) < 0.02
    assert uniforms([5], [7])[0] == uniforms([1, 5], [3, 7])[1]
    assert uniforms([2**63 - 1], [10**6])[0] < 1


def expect(logits: torch.Tensor, row: Row, adjusted: torch.Tensor) -> None:
    """Check that the row samples from the adjusted logits, greedily and at temperature 1."""
    row.params = replace(row.params, temperature=0.0)
    assert draw(logits, [row]) == [int(adjusted.argmax())]
    params = replace(row.params, temperature=1.0)
    n = 5_000
    # The random number depends on the step: all rows have the same tokens and their own seed.
    rows = [Row(params, i, row.tokens, row.prompt_ids, row.banned) for i in range(n)]
    counts = np.bincount(draw(logits.expand(n, -1), rows), minlength=VOCABULARY)
    assert agree(counts, adjusted[0].softmax(-1).double().cpu().numpy())


def test_repetition_penalty_counts_prompt_and_tokens(logits):
    row = Row(SamplingParams(repetition_penalty=1.8), tokens=[1, 2, 2], prompt_ids=[5, 5, 9])
    expect(
        logits,
        row,
        hf.RepetitionPenaltyLogitsProcessor(1.8)(
            torch.tensor([[5, 5, 9, 1, 2, 2]], device=logits.device), logits.clone()
        ),
    )


def test_frequency_and_presence_penalties_count_tokens_only(logits):
    adjusted = logits.clone()
    adjusted[0, 1] -= 0.7 + 0.4
    adjusted[0, 2] -= 2 * 0.7 + 0.4
    expect(
        logits,
        Row(
            SamplingParams(frequency_penalty=0.7, presence_penalty=0.4),
            tokens=[1, 2, 2],
            prompt_ids=[5],
        ),
        adjusted,
    )


def test_logit_bias_and_bans(logits):
    adjusted = logits.clone()
    adjusted[0, 3] += 4.0
    adjusted[0, int(logits.argmax())] -= 100.0
    bias = {3: 4.0, int(logits.argmax()): -100.0}
    expect(logits, Row(SamplingParams(logit_bias=bias)), adjusted)
    adjusted[0, [0, 3]] = -torch.inf
    expect(logits, Row(SamplingParams(logit_bias=bias), banned=frozenset({0, 3})), adjusted)


def test_the_original_logits_stay_unchanged(logits):
    original = logits.clone()
    draw(
        logits,
        [Row(SamplingParams(logit_bias={1: 5.0}, top_k=3, repetition_penalty=1.3), prompt_ids=[1])],
    )
    assert torch.equal(logits, original)


def choose(logits: np.ndarray, params: SamplingParams, number: float) -> int:
    """Sample from [k] logits by the definition, in numpy."""
    if not params.temperature:
        return int(np.argmax(logits))
    p = np.exp((logits - logits.max()) / params.temperature)
    p /= p.sum()
    p[p < params.min_p * p.max()] = 0.0
    order = np.argsort(-p, kind="stable")
    if params.top_k > 0:
        p[order[params.top_k :]] = 0.0
    preceding = np.cumsum(p[order]) - p[order]
    p[order[1:][preceding[1:] >= params.top_p * p.sum()]] = 0.0
    cdf = p.cumsum() / p.sum()
    return int(cdf.searchsorted(number, side="right"))


def test_float64_columns_are_sampled_as_defined():
    generator = np.random.default_rng(5)
    for _ in range(300):
        logits = generator.normal(size=int(generator.integers(1, 21))) * 3
        params = SamplingParams(
            temperature=float(generator.choice([0.0, 0.7, 1.0, 1.3])),
            top_p=float(generator.choice([1.0, 0.9, 0.5])),
            top_k=int(generator.choice([0, -1, 3, 50])),
            min_p=float(generator.choice([0.0, 0.05, 0.3])),
        )
        number = generator.random()
        columns = torch.from_numpy(logits)[None]
        assert sample_at(columns, [params], np.array([number])) == [choose(logits, params, number)]
