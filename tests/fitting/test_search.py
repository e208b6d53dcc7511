"""Test the search for betas of given KL, on curves whose answer is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from infer_align.fitting.curve import BetaSample
from infer_align.fitting.search import MAX_TRIES, Trials, search_betas

pytestmark = pytest.mark.anyio

TARGETS = (0.5, 1.0, 2.0, 5.0, 10.0)


class Curve:
    """A KL that depends on beta by a function; it counts the measurements."""

    def __init__(self, function: Callable[[float], float]) -> None:
        self.function = function
        self.probed: list[float] = []
        self.measured: list[float] = []

    async def search(
        self, largest: float = 1000.0, targets: tuple[float, ...] = TARGETS
    ) -> list[BetaSample]:
        async def probe(beta: float) -> float:
            self.probed.append(beta)
            return self.function(beta)

        async def run(beta: float) -> BetaSample:
            self.measured.append(beta)
            return BetaSample(beta, np.zeros(2), np.full(2, self.function(beta)))

        return await search_betas(Trials(probe, run), targets, largest)


SHAPES: dict[str, Callable[[float], float]] = {
    "a reward of small scale": lambda beta: (beta / 70) ** 2,
    "a reward of large scale": lambda beta: (beta * 300) ** 2,
    "a KL that grows ever more slowly": lambda beta: 40 * beta**2 / (400 + beta**2),
    "a KL that grows ever faster": lambda beta: 0.01 * beta**2 + 1e-4 * beta**4,
    "a linear KL": lambda beta: beta / 9,
}


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_beta_is_measured_near_each_target(shape: str) -> None:
    curve = Curve(SHAPES[shape])
    samples = await curve.search()
    betas = [sample.beta for sample in samples]
    assert betas == sorted(betas)
    assert betas[0] == 0
    for target in TARGETS:
        assert any(0.7 * target <= s.kl <= 1.05 * target for s in samples), target
    assert len(curve.measured) <= 11
    assert len(curve.probed) <= 8


async def test_a_search_by_noisy_kl_ends() -> None:
    generator = np.random.default_rng(3)
    curve = Curve(lambda beta: beta**2 / 100 + generator.normal() * 0.3)
    samples = await curve.search()
    assert len(curve.measured) <= 1 + MAX_TRIES * len(TARGETS)
    assert 5 < max(sample.kl for sample in samples) < 20


async def test_a_value_without_effect_is_measured_once_at_the_largest_beta() -> None:
    curve = Curve(lambda _: 0.0)
    samples = await curve.search(largest=64.0)
    assert [sample.beta for sample in samples] == [0.0, 64.0]


async def test_no_beta_is_above_the_largest() -> None:
    curve = Curve(lambda beta: (beta / 4) ** 2)
    samples = await curve.search(largest=8.0)
    assert max(curve.measured + curve.probed) == 8.0
    assert samples[-1].kl == 4.0
    assert len(set(curve.measured)) == len(curve.measured)


async def test_a_target_that_another_beta_meets_costs_nothing() -> None:
    curve = Curve(lambda beta: beta**2)
    await curve.search(targets=(4.0, 4.01, 4.0))
    assert len(curve.measured) == 2
