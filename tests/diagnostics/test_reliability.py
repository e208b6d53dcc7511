"""The share of gold that a reward explains, by level of the reward."""

from __future__ import annotations

import math

import numpy as np
import pytest

from infer_align.diagnostics.reliability import r_squared, reliability


def world(prompts: int = 60, answers: int = 100) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return scores and gold: the score is gold below the mean, and noise above it."""
    generator = np.random.default_rng(4)
    scores: list[np.ndarray] = []
    gold: list[np.ndarray] = []
    for _ in range(prompts):
        truth = generator.normal(size=answers)
        noise = np.abs(generator.normal(size=answers))
        offset = generator.normal() * 50
        scores.append(np.where(truth < 0, truth, noise) + offset)
        gold.append(truth + generator.normal() * 50)
    return scores, gold


def test_noise_at_the_top_is_seen_by_level() -> None:
    levels = reliability(*world())
    assert len(levels) == 5
    assert levels[0].r_squared > 0.9
    assert levels[-1].r_squared < 0.05
    assert levels[-1].noise == pytest.approx(1 / (levels[-1].answers - 1))
    golds = [level.gold.value for level in levels]
    assert golds[0] < golds[1] < golds[2]
    assert sum(level.answers for level in levels) == 6000
    assert [level.high for level in levels[:-1]] == [level.low for level in levels[1:]]


def test_offsets_of_prompts_do_not_count() -> None:
    generator = np.random.default_rng(5)
    gold = [generator.normal(size=20) + 100 * i for i in range(10)]
    shuffled = [3 * row - 1000 * i for i, row in enumerate(gold)]
    assert r_squared(shuffled, gold) > 0.9
    unrelated = [generator.normal(size=20) + 100 * i for i in range(10)]
    assert r_squared(unrelated, gold) < 0.1


def test_equal_scores_stay_in_one_level() -> None:
    levels = reliability([[0, 0, 0, 0, 0, 0, 0, 1]], [[1, 2, 3, 4, 5, 6, 7, 8]])
    assert len(levels) == 1
    assert reliability([[1, 1]], [[0, 1]]) == ()
    assert reliability([], []) == ()
    assert reliability([[math.nan]], [[1.0]]) == ()
