"""The scale of score differences, and predicted against true shares."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.diagnostics.calibration import calibration, fit_scale

DIFFERENCES = st.lists(
    st.floats(-5, 5, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-3),
    min_size=2,
    max_size=12,
).filter(lambda xs: min(xs) < 0 < max(xs))


def likelihood(scale: float, differences: list[float]) -> float:
    return float(-np.logaddexp(0, -scale * np.array(differences)).sum())


@given(DIFFERENCES)
def test_no_other_scale_is_likelier(differences: list[float]) -> None:
    scale = fit_scale(differences)
    best = likelihood(scale, differences)
    for other in (scale * 1.01, scale * 0.99, scale + 0.01, scale - 0.01, 0.0, 1.0):
        assert likelihood(other, differences) <= best + 1e-9


@pytest.mark.slow
@given(DIFFERENCES, st.sampled_from([1e-6, 0.5, 20.0, 1e6]))
def test_the_scale_is_inverse_to_the_unit_of_the_scores(
    differences: list[float], unit: float
) -> None:
    scale = fit_scale(differences)
    scaled = fit_scale([unit * d for d in differences])
    assert scaled * unit == pytest.approx(scale, rel=1e-6, abs=1e-9)
    assert fit_scale([-d for d in differences]) == pytest.approx(-scale, rel=1e-6, abs=1e-9)


def test_scales_that_have_no_maximum() -> None:
    assert fit_scale([1.0, 0.0]) == math.inf
    assert fit_scale([-1.0, 0.0]) == -math.inf
    assert math.isnan(fit_scale([0.0, 0.0]))
    assert math.isnan(fit_scale([math.nan]))
    with pytest.raises(ValueError, match="scale"):
        calibration([1.0], math.inf)


def bradley_terry(scale: float, pairs: int = 10_000) -> np.ndarray:
    """Return differences of a reward whose true log-odds are `scale` times as large."""
    generator = np.random.default_rng(2)
    differences = generator.normal(size=pairs) * 2
    right = generator.random(pairs) < 1 / (1 + np.exp(-scale * differences))
    return np.where(right, differences, -differences)


@pytest.mark.parametrize("scale", [1.0, 0.3, 3.0, -0.5])
def test_the_scale_of_a_bradley_terry_world_is_recovered(scale: float) -> None:
    differences = bradley_terry(scale)
    assert fit_scale(differences) == pytest.approx(scale, rel=0.1)
    assert calibration(differences, fit_scale(differences)).expected_error < 0.03


def test_a_reward_that_is_too_sure_has_an_error() -> None:
    report = calibration(bradley_terry(0.3))
    assert report.expected_error > 0.1
    surest = report.bins[-1]
    assert (surest.low, surest.high) == (0.95, 1.0)
    assert surest.predicted > 0.95
    assert surest.right < 0.85
    assert sum(entry.pairs for entry in report.bins) == 10_000


def test_ties_are_predicted_as_a_coin() -> None:
    report = calibration([0.0, 0.0])
    (entry,) = report.bins
    assert (entry.predicted, entry.right, report.expected_error) == (0.5, 0.5, 0.0)
    assert calibration([]).bins == ()
