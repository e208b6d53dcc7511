"""Neighbours: uniform on the cap in any dimension, or the authors' grid, at equal budget."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer_align.errors import InvalidRequest
from infer_align.methods import PlanDraft
from infer_align.methods.dpa import DPA, unit
from infer_align.methods.rps import RPS, neighbors, published_neighbors
from infer_align.objectives import project, rank
from infer_align.types import Draw

ALIGN = {"dpa": {"direction": {"helpfulness": 1.0}}, "rps": {}}

ORACLE = json.loads(
    (Path(__file__).parents[1] / "data" / "rps_public.json").read_text(encoding="utf-8")
)
GRID = ORACLE["grid_neighbours"]


def degrees(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Angles of rows to a vector, exact for small ones too."""
    return np.degrees(
        2 * np.arctan2(np.linalg.norm(one - other, axis=-1), np.linalg.norm(one + other, axis=-1))
    )


@pytest.mark.parametrize("case", GRID, ids=lambda c: c["id"])
def test_the_authors_neighbours(case: dict[str, Any]) -> None:
    assert case["step"] == 5
    rest = case["top_k"], case["theta_max"], tuple(case["angle_range"])
    assert (
        published_neighbors(case["target_degrees"], *rest) == case["expected_angles_nearest_first"]
    )
    y, x = case["target_vector"][::-1]
    exact = math.degrees(math.atan2(y, x))
    assert published_neighbors(exact, *rest) == case["expected_angles_nearest_first"]


@pytest.mark.parametrize("case", ORACLE["selection"], ids=lambda c: c["id"])
def test_selection_is_by_the_target(case: dict[str, Any]) -> None:
    pair = ("helpfulness", "verbosity")
    values = np.array(case["rewards_help_verb"]).T[:, None]
    scores = project(dict(zip(pair, case["target_vector"], strict=True)), values, pair)[0]
    np.testing.assert_allclose(scores, case["expected_scores_by_target"], atol=1e-9)
    assert rank(scores)[0] == case["expected_index"]


@pytest.mark.parametrize("case", ORACLE["rotation_2d"], ids=lambda c: c["id"])
def test_two_dimensions_are_an_arc(case: dict[str, Any]) -> None:
    angle, offset = case["target_degrees"], case["offset_degrees"]
    target = {"x": math.cos(math.radians(angle)), "y": math.sin(math.radians(angle))}
    near = neighbors(target, 2000, abs(offset), seed=1)
    points = np.array([[v["x"], v["y"]] for v in near])
    distance = degrees(points, np.array(case["expected_unit"]))
    assert distance.min() < abs(offset) / 50, "the edge is reached"
    turned = (np.degrees(np.arctan2(points[:, 1], points[:, 0])) - angle + 180) % 360 - 180
    assert np.histogram(turned, bins=4, range=(-abs(offset), abs(offset)))[0].min() > 400


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.floats(0, 180), st.integers(0, 2**63 - 1))
def test_neighbours_are_unit_and_within_the_angle(
    dimension: int, k: int, angle: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    target = {
        f"a{i}": x * 10.0 ** rng.integers(-20, 20) for i, x in enumerate(rng.normal(size=dimension))
    }
    drawn = neighbors(target, k, angle, seed)
    assert len(drawn) == k
    assert all([*v] == [*target] for v in drawn)
    rows, v = np.array([[*n.values()] for n in drawn]), np.array([*unit(target).values()])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-12)
    assert (degrees(rows, v) <= angle + 1e-12).all()
    assert neighbors(target, k, angle, seed) == drawn
    assert neighbors(target, k + 3, angle, seed)[:k] == drawn
    if dimension > 1 and angle > 1:
        assert neighbors(target, k, angle, seed + 1) != drawn


@pytest.mark.parametrize("case", ORACLE["angle_membership_any_d"], ids=lambda c: c["id"])
def test_membership_in_any_dimension(case: dict[str, Any]) -> None:
    target, limit = np.array(case["target"]), case["theta_max_degrees"]
    candidate = np.array(case["candidate"]) * case["scale_applied_to_candidate"]
    angle = float(degrees(candidate / np.linalg.norm(candidate), target / np.linalg.norm(target)))
    assert angle == pytest.approx(case["expected_angle_degrees"], abs=1e-6)
    if case["boundary_safe"]:
        assert (angle <= limit) == case["expected_inside"]
    near = np.array(
        [
            [*v.values()]
            for v in neighbors({str(i): x for i, x in enumerate(target)}, 50, limit, seed=3)
        ]
    )
    norms = np.linalg.norm(near, axis=1) * np.linalg.norm(target)
    assert (np.degrees(np.arccos(near @ target / norms)) <= limit).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dimension", "angle"),
    [(2, 30), (3, 30), (3, 100), (4, 80), (8, 45), (8, 89), (30, 60), (30, 88)],
)
def test_uniform_by_area(dimension: int, angle: float) -> None:
    """The share within an inner cap is the share of its area: the integral of sin^(d-2)."""
    target = {str(i): float(i == 0) for i in range(dimension)}
    rows = np.array([[*v.values()] for v in neighbors(target, 4000, angle, seed=5)])
    angles = np.sort(degrees(rows, np.eye(dimension)[0]))
    grid = np.linspace(0, math.radians(angle), 20_001)
    area = np.cumsum(np.sin(grid) ** (dimension - 2))
    expected = np.interp(np.radians(angles), grid, area / area[-1])
    assert np.abs(expected - (np.arange(4000) + 0.5) / 4000).max() < 1.63 / math.sqrt(4000), (
        "Kolmogorov-Smirnov at 1%"
    )
    assert np.linalg.norm(rows[:, 1:].mean(axis=0)) < 5 / math.sqrt(4000), "no side is preferred"


@pytest.mark.parametrize(
    "arguments",
    [
        ({"a": 1.0}, 0, 30.0),
        ({"a": 1.0}, 2, 181.0),
        ({"a": 1.0}, 2, -1.0),
        ({"a": 1.0}, 2, math.nan),
    ],
)
def test_what_is_out_of_range(arguments: Any) -> None:
    with pytest.raises(ValueError, match="max_angle"):
        neighbors(*arguments, seed=0)
    for direction in ({"a": 0.0}, {"a": math.nan}, {}):
        with pytest.raises(ValueError, match="no length"):
            neighbors(direction, 2, 30.0, seed=0)


def planned(rps: RPS, direction: dict[str, float], n: int = 1, seed: int = 0) -> PlanDraft:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]
    plan = PlanDraft(
        (Draw({"messages": messages}, n),),
        messages=messages,
        seed=seed,
        attributes=("warmth",),
    )
    return rps.apply(DPA(direction).apply(plan))


def test_each_draw_is_told_its_own_direction_once() -> None:
    plan = planned(RPS(), {"helpfulness": 1.0, "verbosity": 1.0}, n=2, seed=7)
    assert [draw.n for draw in plan.draws] == [2] * 5
    assert plan.selects
    assert not plan.note
    assert plan.direction == unit({"helpfulness": 1.0, "verbosity": 1.0})
    for draw in plan.draws:
        text = draw.body["messages"][0]["content"]
        assert text.count("weighted rating") == 1
        assert text.endswith("\n\nBe kind.")
        assert draw.direction is not None
        assert (
            text
            == DPA(dict(draw.direction))
            .apply(PlanDraft((Draw({"messages": plan.messages}),)))
            .draws[0]
            .body["messages"][0]["content"]
        )
    assert len({repr(draw.direction) for draw in plan.draws}) == 5


@pytest.mark.parametrize("case", ORACLE["equal_budget_baseline"], ids=lambda c: c["id"])
def test_the_baseline_spends_as_much_on_the_target(case: dict[str, Any]) -> None:
    angle = math.radians(case["directions"][0])
    direction = {"helpfulness": math.cos(angle), "verbosity": math.sin(angle)}
    baseline = planned(RPS(k=case["k"], neighborhood="none"), direction, n=3)
    assert [(draw.n, draw.direction) for draw in baseline.draws] == [
        (3 * case["k"], unit(direction))
    ]
    assert baseline.candidates == planned(RPS(k=case["k"]), direction, n=3).candidates
    assert not baseline.note


def test_fewer_directions_than_k_keep_the_budget_and_say_so() -> None:
    still = planned(RPS(k=5, max_angle=0), {"helpfulness": 1.0, "verbosity": 1.0})
    assert [draw.n for draw in still.draws] == [5]
    assert "1 of 5 directions" in still.note
    grid = planned(
        RPS(k=7, max_angle=10, neighborhood="published"), {"helpfulness": 1.0, "verbosity": 1.0}
    )
    assert [draw.n for draw in grid.draws] == [4, 3], "40 and 35 of a target of 45"
    assert "2 of 7 directions within 10 degrees" in grid.note
    far = planned(RPS(neighborhood="published"), {"helpfulness": -1.0, "verbosity": 0.1})
    assert [(draw.n, draw.direction) for draw in far.draws] == [(5, far.direction)]


def test_published_takes_the_templates_order() -> None:
    one = planned(RPS(neighborhood="published"), {"verbosity": 0.0, "helpfulness": 1.0})
    angles = [
        round(math.degrees(math.atan2(d.direction["verbosity"], d.direction["helpfulness"])))
        for d in one.draws
        if d.direction
    ]
    assert sorted(angles) == [-10, -5, 0, 5, 10]


def test_published_needs_two_attributes() -> None:
    with pytest.raises(InvalidRequest, match="names 3") as refused:
        planned(
            RPS(neighborhood="published"), {"helpfulness": 1.0, "verbosity": 1.0, "warmth": 1.0}
        )
    assert refused.value.param == "align.rps.neighborhood"


def test_without_a_direction() -> None:
    with pytest.raises(InvalidRequest, match=r"align\.dpa\.direction"):
        RPS().apply(PlanDraft((Draw({"messages": []}),)))


@pytest.mark.parametrize("neighborhood", ["uniform", "published"])
def test_attributes_that_are_not_named_are_part_of_the_space(neighborhood: Any) -> None:
    implicit, explicit = ({"helpfulness": 1.0}, {"helpfulness": 1.0, "verbosity": 0.0})
    drawn = []
    for direction in (implicit, explicit):
        made = PlanDraft((Draw({"messages": [{"role": "user", "content": "x"}]}),), seed=4)
        plan = RPS(neighborhood=neighborhood).apply(
            DPA(direction).apply(replace(made, messages=made.draws[0].body["messages"]))
        )
        drawn.append([draw.direction for draw in plan.draws])
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 5


def test_an_empty_neighbourhood_says_so() -> None:
    made = PlanDraft((Draw({"messages": [{"role": "user", "content": "x"}]}),))
    plan = RPS(neighborhood="published", max_angle=1).apply(
        DPA({"helpfulness": 0.2, "verbosity": 1.0}).apply(made)
    )
    assert "no direction of the grid within 1 degrees; all 5 draws are from the target" in plan.note
    for k, angle in ((0, 30.0), (-1, 30.0), (3, 181.0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            published_neighbors(20, k, angle)
