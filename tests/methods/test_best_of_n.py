"""The unbiased estimator and the KL bound, against vectors from the paper's published code."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.methods import PlanDraft
from infer_align.methods.best_of_n import BestOfN, expected_best, kl_upper_bound
from infer_align.types import Draw

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "bon_estimator_public.json").read_text())


@pytest.mark.parametrize("case", VECTORS["random"], ids=lambda case: case["id"])
def test_published_estimator(case: dict) -> None:
    for score in ("gold", "proxy"):
        expected = [
            expected_best(q["proxy"], q[score], case["n"]) for q in case["questions_unsorted"]
        ]
        assert np.mean(expected) == pytest.approx(case[f"expected_{score}"], rel=1e-9)


@pytest.mark.parametrize("case", VECTORS["linear"], ids=lambda case: case["id"])
def test_closed_form(case: dict) -> None:
    ranks = np.arange(1, case["N"] + 1)
    assert expected_best(ranks, ranks, case["n"]) == pytest.approx(case["expected"], rel=1e-9)


@pytest.mark.parametrize("case", VECTORS["proxy_ties"], ids=lambda case: case["id"])
def test_ties_count_as_ordered_at_random(case: dict) -> None:
    value = expected_best(case["proxy"], case["gold"], case["n"])
    assert value == pytest.approx(case["expected_gold_uniform_tie_break"], rel=1e-9)


@pytest.mark.parametrize("case", VECTORS["kl"], ids=lambda case: case["id"])
def test_kl_upper_bound(case: dict) -> None:
    assert kl_upper_bound(case["n"]) == pytest.approx(case["kl_bon_nats"], rel=1e-9, abs=1e-12)


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(-5, 5)), min_size=1, max_size=7), st.data())
def test_equals_the_mean_over_all_subsets(
    pairs: list[tuple[int, float]], data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, len(pairs)))
    best = []
    for subset in itertools.combinations(pairs, n):
        top = max(proxy for proxy, _ in subset)
        best.append(np.mean([gold for proxy, gold in subset if proxy == top]))
    value = expected_best([p for p, _ in pairs], [g for _, g in pairs], n)
    # All members of a tied group are equally likely: random tie-breaking gives their mean.
    assert value == pytest.approx(np.mean(best), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("proxy", "gold", "n", "message"),
    [
        ([1.0], [1.0], 2, "must be 1 to 1"),
        ([1.0], [1.0, 2.0], 1, "shapes"),
        ([np.nan], [1.0], 1, "NaN"),
    ],
)
def test_bad_input_is_named(proxy: list[float], gold: list[float], n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expected_best(proxy, gold, n)


@pytest.mark.parametrize(
    ("proxy", "gold", "n", "best"),
    [
        ([1.0, 2.0, -math.inf], [1.0, 2.0, -math.inf], 2, 5 / 3),
        ([0.0, 1.0, 2.0], [math.inf, 1.0, 2.0], 2, 5 / 3),
        ([1.0, 2.0, 3.0], [1.0, 2.0, math.inf], 2, math.inf),
    ],
)
def test_an_infinite_score_counts_only_if_a_subset_selects_it(
    proxy: list[float], gold: list[float], n: int, best: float
) -> None:
    assert expected_best(proxy, gold, n) == pytest.approx(best, rel=1e-12)


def test_kl_of_no_draws_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        kl_upper_bound(0)


def test_plan_multiplies_every_draw() -> None:
    plan = PlanDraft(draws=(Draw(body={}, n=2), Draw(body={})))
    planned = BestOfN(n=4).apply(plan)
    assert [draw.n for draw in planned.draws] == [8, 4]
    assert planned.selects
    assert not plan.selects
