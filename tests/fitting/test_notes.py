"""Test what a user is told about a suggested beta."""

from __future__ import annotations

import math

import numpy as np
import pytest

from infer_align.config.fitting import FitConfig
from infer_align.fitting.baseline import BestOfPoint
from infer_align.fitting.curve import BetaSample, suggest_beta
from infer_align.fitting.notes import explain

GROUPS = np.arange(60) % 20
BASELINE = (BestOfPoint(2, 0.6, 0.05, 0.2, 0.03, 0.19), BestOfPoint(4, 0.9, 0.05, 0.4, 0.03, 0.64))


def notes(curve: dict[float, tuple[float, float]], config: FitConfig | None = None) -> str:
    """Return the notes on a curve of {beta: (gain, KL)}."""
    config = config or FitConfig()
    rewards = np.random.default_rng(0).normal(size=60)
    samples = [BetaSample(0.0, rewards, np.zeros(60))]
    for beta, (gain, kl) in curve.items():
        noise = 0.1 * np.random.default_rng(int(beta)).normal(size=60)
        samples.append(BetaSample(beta, rewards + gain + noise, np.full(60, kl)))
    suggested = suggest_beta(samples, GROUPS, config.kl_limit)
    return "\n".join(explain(samples, GROUPS, suggested, config, BASELINE))


def test_a_clear_maximum_above_the_baseline_needs_no_note() -> None:
    assert notes({2: (0.3, 1), 4: (0.9, 3), 8: (0.5, 9)}) == ""


def test_noise_is_named() -> None:
    text = notes({2: (0.0, 1), 4: (0.01, 3), 8: (0.0, 9)})
    assert text.startswith("No beta differs from 0 by two standard errors, up to 9 nats.")
    assert "Best of 2 gains more" in text


def test_the_end_of_the_grid_is_named() -> None:
    text = notes({2: (0.3, 1), 4: (0.6, 3), 8: (1.0, 9)})
    assert text.startswith("Beta 8 is the end of the grid, at 9 nats")
    assert "--fit kl_limit" in text
    text = notes({2: (0.3, 1), 4: (0.6, 3), 8: (1.0, 9)}, FitConfig(largest_beta=8.0))
    assert "it is largest_beta" in text


def test_a_better_beta_above_the_limit_is_named() -> None:
    text = notes({2: (0.7, 1), 4: (0.5, 3), 8: (1.0, 9), 16: (1.6, 28)})
    assert "Beta 16 gains 0." in text
    assert "at 28 nats, above kl_limit = 10" in text
    assert "Beta 8 is the end of the grid" in text


def test_a_limit_below_every_measured_kl_is_named() -> None:
    text = notes({2: (0.5, 4), 4: (0.9, 9)}, FitConfig(kl_limit=0.1))
    assert text.startswith("No beta was measured within kl_limit = 0.1 nats")


def test_a_better_best_of_n_is_named() -> None:
    text = notes({2: (0.25, 1), 4: (0.1, 3)})
    assert "Best of 4 gains more than the suggestion: +0.400 ± 0.030 against +0.2" in text
    assert "for 4 times the tokens" in text


@pytest.mark.parametrize("unscored", [1, 60])
def test_unscored_replies_are_counted(unscored: int) -> None:
    rewards = np.ones(60)
    rewards[:unscored] = math.nan
    samples = [
        BetaSample(0.0, np.zeros(60), np.zeros(60)),
        BetaSample(2.0, rewards, np.full(60, 1.0)),
    ]
    suggested = suggest_beta(samples, GROUPS, 10)
    text = "\n".join(explain(samples, GROUPS, suggested, FitConfig(curve_replies=60), ()))
    assert f"With beta 2, {unscored} of 60 replies could not be scored." in text
