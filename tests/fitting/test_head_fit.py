"""Test the choice of the method and the strength of a head's fit."""

from __future__ import annotations

from typing import Any

import pytest

from infer_align.config.fitting import FitConfig
from infer_align.fitting import head_fit, regression
from infer_align.fitting.head_fit import RIDGES, fit_head

CONFIG = FitConfig(rank=4, width=8, epochs=2)


def linear(hidden: Any, _: Any) -> Any:
    return hidden[:, 0] - hidden[:, 1]


def fit(replies: Any, config: FitConfig, lines: list[str]) -> head_fit.FittedHead:
    held = regression.split_by_prompt(replies.prompt_index.tolist(), 0.2, 0)
    return fit_head(replies, held, 12, config, 0, lines.append)


def test_few_samples_are_fitted_by_ridge_with_the_strength_that_predicts_best(plant: Any) -> None:
    lines: list[str] = []
    fitted = fit(plant(linear, 40, 1, 6, 12), CONFIG, lines)
    assert fitted.config.method == "ridge"
    assert fitted.config.ridge in RIDGES
    assert fitted.fitness.r2 > 0.8
    scores = {line.split()[3].rstrip(":"): float(line.split()[5]) for line in lines}
    assert len(scores) == len(RIDGES)
    assert scores[f"{fitted.config.ridge:g}"] == max(scores.values())


def test_many_samples_are_fitted_by_the_better_method(
    plant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_fit, "FEW_SAMPLES", 100)
    lines: list[str] = []
    fitted = fit(plant(linear, 40, 1, 6, 12), CONFIG, lines)
    assert any(line.startswith("fit by sgd: R²") for line in lines)
    assert fitted.config.method == "ridge"


@pytest.mark.parametrize(("method", "ridge"), [("sgd", None), ("ridge", 7.0), ("auto", 7.0)])
def test_given_settings_are_used_as_they_are(plant: Any, method: Any, ridge: float | None) -> None:
    lines: list[str] = []
    config = FitConfig(method=method, ridge=ridge, rank=4, width=8, epochs=1)
    fitted = fit(plant(linear, 20, 1, 6, 12), config, lines)
    assert fitted.config.ridge == ridge
    assert fitted.config.method == ("sgd" if method == "sgd" else "ridge")
    assert not any(line.startswith("fit by") for line in lines)
