"""Test the draw of a GPU in Triton's interpreter: the fused sampler against the two steps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from infer_align.decoding.params import SamplingParams
from infer_align.decoding.sampler import sample, uniforms
from infer_align.decoding.steering import steer
from infer_align.decoding.steering_batch import SteeringBatch
from infer_align.engines.transformers.drawing import draw_tokens
from infer_align.steering import Steering
from infer_align.values import FrozenModel
from infer_align.values.head import HeadValue, write

V = 90
D = 6
CPU = torch.device("cpu")


@dataclass(eq=False)
class DrawnRow:
    """The part of an engine's row that a draw reads."""

    params: SamplingParams
    job: Any
    seed: int
    tokens: list[int] = field(default_factory=list)
    is_due: bool = False


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> list[HeadValue]:
    folder: Path = tmp_path_factory.mktemp("heads")
    frozen = FrozenModel("tiny", V, D, "tokens", "cpu")
    generator = torch.Generator().manual_seed(1)
    heads: list[HeadValue] = []
    for i in range(2):
        shapes = {"P": (3, D), "E": (V, 3), "b": (V,)}
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        path = folder / f"{i}.safetensors"
        write(path, tensors, frozen, {})
        head = HeadValue(str(path))
        head.start(frozen, {})
        heads.append(head)
    return heads


def make_rows(heads: list[HeadValue], seed: int) -> list[DrawnRow]:
    """Make a row of every kind: plain, greedy, truncated, and steered in all ways."""
    plain = SamplingParams(temperature=0.9, top_p=1.0)
    one = {heads[0]: 1.5}
    both = {heads[0]: 1.0, heads[1]: -2.0}
    kinds: list[tuple[SamplingParams, Steering | None, dict[HeadValue, float]]] = [
        (plain, None, {}),
        (replace(plain, temperature=0.0), None, {}),
        (replace(plain, top_p=0.8), Steering({"a": 1.5}, 5, "keep"), one),
        (plain, Steering({"a": 1.5}, 5, "keep"), one),
        (plain, Steering({"a": 1.0, "b": -2.0}, 9, "mask"), both),
        (plain, Steering({"a": 1.5}, "all", "keep"), one),
        (plain, Steering({"a": 1.0, "b": -2.0}, "all", "keep"), both),
        (plain, Steering({"a": 1.5}, 20, "keep", 0.1), one),
        (replace(plain, logprobs=2), Steering({"a": 1.5}, 5, "keep"), one),
    ]
    rows = []
    for i, (params, steering, weights) in enumerate(kinds):
        draw = SimpleNamespace(steering=steering)
        job = SimpleNamespace(draw=draw, steering=weights)
        rows.append(DrawnRow(params, job, seed + i, [0] * (seed % 3)))
    return rows


def make_steering(rows: list[DrawnRow], heads: list[HeadValue]) -> SteeringBatch:
    beta = np.zeros((len(rows), len(heads)), np.float32)
    top_k = np.zeros(len(rows), np.int64)
    min_p = np.zeros(len(rows), np.float32)
    masked = np.zeros(len(rows), np.bool_)
    for i, row in enumerate(rows):
        steering = row.job.draw.steering
        if steering is None:
            continue
        beta[i] = [row.job.steering.get(head, 0.0) for head in heads]
        top_k[i] = -1 if steering.candidates is None else steering.candidates
        min_p[i] = steering.min_p or 0.0
        masked[i] = steering.tail == "mask"
    return SteeringBatch.build(heads, beta, top_k, masked, CPU, min_p=min_p)


def draw(rows: Any, heads: list[HeadValue], logits: torch.Tensor, hidden: torch.Tensor) -> Any:
    steering = make_steering(rows, heads)
    drawn = draw_tokens(logits, hidden, rows, steering, {})
    steered = steer(logits, hidden, steering)
    return drawn, sample(steered, rows), steered


def test_a_seed_gives_the_token_of_the_two_steps(heads: list[HeadValue]) -> None:
    generator = torch.Generator().manual_seed(2)
    rows: Any = [row for seed in (0, 100, 200) for row in make_rows(heads, seed)]
    logits = torch.randn((len(rows), V), generator=generator) * 3
    original = logits.clone()
    hidden = torch.randn((len(rows), D), generator=generator)
    drawn, expected, steered = draw(rows, heads, logits, hidden)
    assert torch.equal(logits, original)
    # The steered logits of the row that reports logprobs.
    torch.testing.assert_close(drawn.steered[8], steered[8])
    assert drawn.tokens == expected


def test_the_token_of_a_row_does_not_depend_on_its_batch(heads: list[HeadValue]) -> None:
    rows: Any = make_rows(heads, 7)
    logits = torch.randn((len(rows), V), generator=torch.Generator().manual_seed(3)) * 3
    hidden = torch.randn((len(rows), D), generator=torch.Generator().manual_seed(4))
    together, _, _ = draw(rows, heads, logits, hidden)
    for i in (0, 3, 5):
        alone, _, _ = draw([rows[i]], heads, logits[i : i + 1], hidden[i : i + 1])
        assert alone.tokens == together.tokens[i : i + 1]


def evenly_spread_seeds(count: int) -> list[int]:
    """Return the seeds whose numbers are nearest to the middles of equal parts of [0, 1)."""
    seeds = range(4000)
    numbers = uniforms(seeds, [0] * len(seeds))
    middles = (np.arange(count) + 0.5) / count
    nearest: list[int] = np.abs(numbers[None] - middles[:, None]).argmin(axis=1).tolist()
    assert len(set(nearest)) == count
    return nearest


@pytest.mark.parametrize("kind", [3, 5])
@pytest.mark.slow
def test_the_tokens_follow_the_distribution(heads: list[HeadValue], kind: int) -> None:
    """A draw inverts the distribution, so numbers that are evenly spread give even counts.

    They show a wrong probability better than four times as many random numbers.
    """
    draws = 40
    row = make_rows(heads, 0)[kind]
    rows: Any = [replace(row, seed=seed) for seed in evenly_spread_seeds(draws)]
    logits = torch.randn((1, V), generator=torch.Generator().manual_seed(5))
    hidden = torch.randn((1, D), generator=torch.Generator().manual_seed(6))
    many = (logits.repeat(draws, 1), hidden.repeat(draws, 1))
    drawn = draw_tokens(*many, rows, make_steering(rows, heads), {})
    steered = steer(logits, hidden, make_steering(rows[:1], heads))
    expected = torch.softmax(steered[0].double() / 0.9, dim=0).numpy() * draws
    counts = np.bincount(drawn.tokens, minlength=V)
    # A token has one interval of numbers, at whose ends it may gain or lose one.
    assert np.abs(counts - expected).max() < 1.1
