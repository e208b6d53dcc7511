"""Ensemble objectives, against vectors from the paper's published code, and as properties."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from infer_align.objectives import Ensemble, mean, rank, standardize, std, uwo, wco

VECTORS = json.loads((Path(__file__).parent / "data" / "ensembles_public.json").read_text())
SCORES = hnp.arrays(
    np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(-100, 100)
)
HOLED = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.one_of(st.floats(-100, 100), st.just(float("nan"))),
)


def evaluate(name: str, scores: np.ndarray) -> np.ndarray:
    if name.startswith("UWO_"):
        return uwo(scores, float(name.removeprefix("UWO_")))
    return {"mean": mean, "WCO": wco}[name](scores)


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["id"])
def test_published_objectives(case: dict) -> None:
    scores = np.array(case["scores_KxN"])
    for name, expected in case["expected"].items():
        value = evaluate(name, scores)
        assert value == pytest.approx(
            np.array(expected["scores"]), rel=1e-9, abs=1e-9 * np.abs(scores).max()
        )
        assert rank(value)[0] in expected["near_max_set"]


@pytest.mark.parametrize("case", VECTORS["ddof1_ppo_variant"], ids=lambda case: case["id"])
def test_variance_is_the_population_s(case: dict) -> None:
    scores, k = np.array(case["scores_KxN"]), case["K"]
    ours = uwo(scores, case["coeff"])
    assert np.isfinite(ours).all()
    if k > 1:  # the PPO path's divisor is K - 1: the same penalty, K/(K-1) times as large
        published = mean(scores) - (mean(scores) - ours) * k / (k - 1)
        assert published == pytest.approx(
            np.array(case["expected_ddof1"], dtype=float), rel=1e-9, abs=1e-9
        )


@pytest.mark.parametrize("case", VECTORS["published_wrapper_quirks"], ids=lambda case: case["id"])
def test_published_wrapper_reads_weight_zero_as_one(case: dict) -> None:
    scores = np.array(case["scores_KxN"])
    published = sorted(case["published_wrapper_sorted"]["scores"])
    assert sorted(uwo(scores, case["weight_passed"] or 1.0)) == pytest.approx(published, rel=1e-9)
    if case["weight_passed"] == 0:
        assert sorted(uwo(scores, 0.0)) != pytest.approx(published, rel=1e-9)


@given(SCORES)
def test_weight_zero_is_the_mean_and_wco_bounds_it(scores: np.ndarray) -> None:
    assert np.array_equal(uwo(scores, 0.0), mean(scores))
    assert (wco(scores) <= mean(scores) + 1e-9).all()


@given(HOLED)
def test_nan_members_are_ignored_and_nothing_else(scores: np.ndarray) -> None:
    for objective in (mean, wco, lambda s: uwo(s, 0.7)):
        values = objective(scores)
        for column, value in zip(scores.T, values, strict=True):
            present = column[~np.isnan(column)]
            if len(present):
                assert value == pytest.approx(objective(present[:, None])[0], rel=1e-9, abs=1e-9)
            else:
                assert np.isnan(value)


@pytest.mark.slow
@given(SCORES, st.randoms(use_true_random=False))
def test_objectives_do_not_depend_on_the_order_of_members_or_candidates(
    scores: np.ndarray, random
) -> None:
    k, n = (random.sample(range(size), size) for size in scores.shape)
    for objective in (mean, wco, lambda s: uwo(s, 0.7)):
        assert objective(scores[k][:, n]) == pytest.approx(objective(scores)[n], rel=1e-9, abs=1e-9)


@given(HOLED)
def test_standardize(scores: np.ndarray) -> None:
    result = standardize(scores)
    assert (np.isnan(result) == np.isnan(scores)).all()
    for before, after in zip(scores, result, strict=True):
        present = ~np.isnan(before)
        values = after[present]
        if present.any() and before[present].std() > 1e-6:
            assert values.mean() == pytest.approx(0, abs=1e-6)
            assert values.std() == pytest.approx(1)


def test_standardize_removes_offset_and_scale_between_members() -> None:
    scores = np.array([[1.0, 2.0, 4.0], [103.0, 105.0, 109.0]])
    assert standardize(scores)[0] == pytest.approx(standardize(scores)[1])
    assert Ensemble(standardize=True).reduce(scores) == pytest.approx(standardize(scores)[0])


def test_constant_member_becomes_zero() -> None:
    assert standardize(np.array([[5.0, 5.0]])).tolist() == [[0.0, 0.0]]


def test_rank_is_stable_and_leaves_out_the_unscored() -> None:
    assert rank([1.0, np.nan, 2.0, 1.0, -np.inf]) == (2, 0, 3, 4)


def test_std_of_large_offsets() -> None:
    assert std(np.array([[1e9], [1e9 + 2]])) == pytest.approx([1.0])


def test_one_dimensional_scores_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[members, candidates\]"):
        mean([1.0, 2.0])
