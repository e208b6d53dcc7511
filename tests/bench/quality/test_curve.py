"""The statistics of made-up scores, whose true values are known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from infer_align_bench.quality.advice import make_advice, make_headline
from infer_align_bench.quality.curve import Mean, Point, Table, make_points
from infer_align_bench.quality.grid import Cell, Grid
from infer_align_bench.quality.notebook import ScoredAnswer

# Scores by prompt; None: no score; a list: one score per draw.
Scores = Sequence[float | list[float] | None]


def row(
    key: str, cell: str, prompt: int, gold: float | None, tokens: float, draw: int = 0
) -> ScoredAnswer:
    return ScoredAnswer(
        key=key,
        cell=cell,
        prompt=prompt,
        draw=draw,
        text="",
        gold=gold,
        seconds=tokens / 100,
        spent=int(tokens),
        returned=1,
        prompt_tokens=0,
        scoring=0,
    )


def make_table(
    gold: Mapping[str, Scores],
    tokens: Mapping[str, float],
    family: Sequence[str] = (),
    greedy: str | None = None,
) -> tuple[Table, Grid]:
    """Return the table of the scores and tokens of each setting. The first is the baseline."""
    cells = []
    rows = []
    keys = {}
    for i, (name, scores) in enumerate(gold.items()):
        cells.append(Cell(name, {"n": i}, equal_budget=name in family))
        for prompt, score in enumerate(scores):
            key = f"{name}/{prompt}"
            keys[name, prompt] = key
            draws = score if isinstance(score, list) else [score]
            for draw, value in enumerate(draws):
                rows.append(row(key, name, prompt, value, tokens[name], draw))
    grid = Grid(tuple(cells), cells[0].name, greedy)
    return Table(grid, rows, keys), grid


def by_name(points: Sequence[Point]) -> dict[str, Point]:
    return {point.cell.name: point for point in points}


def standard_error(values: object) -> float:
    array = np.asarray(values, dtype=float)
    return float(array.std(ddof=1) / math.sqrt(array.size))


def test_errors_are_over_prompts_and_differences_are_paired() -> None:
    generator = np.random.default_rng(0)
    difficulty = generator.normal(0, 5, 50)
    noise = generator.normal(0, 0.1, 50)
    gold = {
        "base": difficulty.tolist(),
        "better": (difficulty + 1 + noise).tolist(),
        "greedy": (difficulty - 1).tolist(),
    }
    tokens = {"base": 10, "better": 40, "greedy": 8}
    points = by_name(make_points(*make_table(gold, tokens, greedy="greedy")))
    base, better, greedy = points["base"], points["better"], points["greedy"]
    assert base.gold.value == pytest.approx(difficulty.mean())
    assert base.gold.error == pytest.approx(standard_error(difficulty))
    assert better.minus_baseline is not None
    assert better.minus_baseline.value == pytest.approx(1 + noise.mean())
    assert better.minus_baseline.error == pytest.approx(standard_error(noise))
    assert better.minus_baseline.error < better.gold.error / 20
    assert base.minus_baseline is None
    assert greedy.minus_greedy is None
    assert base.minus_greedy == Mean(pytest.approx(1.0), pytest.approx(0.0, abs=1e-12))
    assert better.cost("tokens") == pytest.approx(40)
    assert better.cost("seconds") == pytest.approx(0.4)


def test_the_draws_of_a_prompt_are_averaged_first() -> None:
    (point,) = make_points(*make_table({"base": [[0.0, 2.0], [3.0, 3.0], [5.0]]}, {"base": 1}))
    assert point.gold.value == pytest.approx(3.0)
    assert point.gold.error == pytest.approx(standard_error([1, 3, 5]))
    assert point.prompts == 3


def test_equal_requests_share_an_answer() -> None:
    rows = [row("same", "a", 0, 3.0, 1), row("other", "a", 2, 5.0, 1)]
    keys = {
        ("a", 0): "same",
        ("a", 1): "same",
        ("a", 2): "other",
        ("b", 0): "same",
        ("b", 1): "same",
        ("b", 2): "missing",
    }
    table = Table(Grid((Cell("a"), Cell("b")), "a"), rows, keys)
    np.testing.assert_array_equal(table.gold, [[3, 3, 5], [3, 3, np.nan]])


def test_answers_without_a_score_are_left_out() -> None:
    gold: dict[str, Scores] = {
        "base": [1.0, None, 3.0],
        "other": [2.0, 2.0, None],
        "none": [None, None, None],
    }
    points = by_name(make_points(*make_table(gold, {"base": 1, "other": 2, "none": 3})))
    assert set(points) == {"base", "other"}
    assert points["base"].gold.value == 2.0
    difference = points["other"].minus_baseline
    assert difference is not None
    assert difference.value == 1.0, "over the one prompt that both have"


def test_a_setting_is_compared_with_the_family_at_the_same_tokens() -> None:
    """The family's gold rises by 1 with each doubling: it is 1 at 20 tokens, 1.5 at sqrt(800)."""
    gold: dict[str, Scores] = {
        "base": [0.0, 0.2],
        "b2": [1.0, 1.2],
        "b4": [2.0, 2.2],
        "at b2": [2.0, 2.4],
        "between": [1.5, 1.7],
        "cheap": [9.0, 9.0],
        "expensive": [9.0, 9.0],
    }
    middle = math.sqrt(800)
    tokens = {
        "base": 10,
        "b2": 20,
        "b4": 40,
        "at b2": 20,
        "between": middle,
        "cheap": 5,
        "expensive": 100,
    }
    table, grid = make_table(gold, tokens, ("b2", "b4"))
    # A row has whole tokens only.
    table.tokens[table.index("between")] = middle
    points = by_name(make_points(table, grid))
    assert points["at b2"].minus_equal == Mean(pytest.approx(1.1), pytest.approx(0.1))
    zero = pytest.approx(0.0, abs=1e-9)
    assert points["between"].minus_equal == Mean(zero, zero)
    assert points["cheap"].minus_equal is None, "outside the family's range"
    assert points["expensive"].minus_equal is None
    assert points["b2"].minus_equal is None


@pytest.fixture
def five_settings() -> tuple[Table, Grid, dict[str, np.ndarray]]:
    """Settings in the order of their cost; "worse" costs more than a better one."""
    generator = np.random.default_rng(1)
    shared = generator.normal(0, 1, 200)
    noise = generator.normal(0, 1, 200)
    gold = {
        "base": shared,
        "cheap": shared + 1,
        "worse": shared + 0.5,
        "hardly better": shared + 1.01 + noise - noise.mean(),
        "best": shared + 3 + generator.normal(0, 0.5, 200),
    }
    tokens = {"base": 10, "cheap": 12, "worse": 20, "hardly better": 40, "best": 100}
    scores = {name: values.tolist() for name, values in gold.items()}
    table, grid = make_table(scores, tokens)
    return table, grid, gold


def test_the_front_has_no_setting_that_a_cheaper_one_beats(
    five_settings: tuple[Table, Grid, dict[str, np.ndarray]],
) -> None:
    table, grid, gold = five_settings
    points = make_points(table, grid)
    assert [point.cell.name for point in points] == list(gold), "cheapest first"
    front = [point.cell.name for point in points if point.front]
    assert front == ["base", "cheap", "hardly better", "best"]
    assert [choice.name for choice in make_advice(table, points)] == front


def test_advice_tells_how_certain_a_choice_is(
    five_settings: tuple[Table, Grid, dict[str, np.ndarray]],
) -> None:
    table, grid, gold = five_settings
    points = make_points(table, grid)
    choices = {choice.name: choice for choice in make_advice(table, points)}
    best = choices["best"]
    assert best.chance > 0.999
    assert best.cheaper is None
    assert best.held_out == pytest.approx(points[-1].gold.value, abs=0.01)
    hardly_better = choices["hardly better"]
    assert hardly_better.chance < 0.95
    assert hardly_better.cheaper is not None
    assert hardly_better.cheaper.name == "cheap"
    difference = gold["hardly better"] - gold["cheap"]
    bound = difference.mean() + 2 * standard_error(difference)
    assert hardly_better.cheaper.max_loss == pytest.approx(bound)


def test_a_headline_names_three_settings(
    five_settings: tuple[Table, Grid, dict[str, np.ndarray]],
) -> None:
    table, grid, _ = five_settings
    headline = make_headline(make_points(table, grid), "base")
    assert headline is not None
    assert headline.cheap is not None
    names = [point.cell.name for point in (headline.cheap, headline.default, headline.best)]
    assert names == ["cheap", "best", "best"]


def test_the_best_of_many_equal_settings_is_not_better_on_other_prompts() -> None:
    generator = np.random.default_rng(6)
    names = ["base", *(f"s{i}" for i in range(20))]
    gold = {name: generator.normal(0, 1, 40).tolist() for name in names}
    tokens = {name: 1 + i for i, name in enumerate(names)}
    table, grid = make_table(gold, tokens)
    last = make_advice(table, make_points(table, grid))[-1]
    assert last.gold.value > 0.2
    assert last.held_out < last.gold.value - 0.1


def test_a_setting_without_a_score_for_some_prompt_is_on_no_front() -> None:
    """Without the hard prompt it looks best; the others are compared on all prompts."""
    gold: dict[str, Scores] = {
        "base": [0.0, 0.0, -9.0],
        "good": [1.0, 1.0, -8.0],
        "lucky": [1.0, 1.0, None],
    }
    table, grid = make_table(gold, {"base": 1, "good": 2, "lucky": 3})
    points = make_points(table, grid)
    lucky = by_name(points)["lucky"]
    assert lucky.gold.value > by_name(points)["good"].gold.value
    assert (lucky.missing, lucky.fronts) == (1, frozenset())
    assert lucky.minus_baseline == Mean(1.0, 0.0)
    choices = make_advice(table, points)
    assert [choice.name for choice in choices] == ["base", "good"]
    assert choices[-1].gold.value == pytest.approx(-2.0)


def test_a_pending_prompt_is_not_required() -> None:
    gold: dict[str, Scores] = {"base": [0.0, 0.0, 1.0], "other": [1.0, 2.0, None]}
    table, grid = make_table(gold, {"base": 1, "other": 2})
    assert not by_name(make_points(table, grid))["other"].front
    table.required[2] = False
    assert by_name(make_points(table, grid))["other"].front


def test_seconds_have_a_front_of_their_own() -> None:
    gold: dict[str, Scores] = {"base": [0.0, 0.2], "long": [1.0, 1.1], "slow": [2.0, 2.2]}
    table, grid = make_table(gold, {"base": 1, "long": 50, "slow": 20})
    table.seconds[:] = np.array([[1.0], [2.0], [9.0]])
    points = make_points(table, grid)
    assert {point.cell.name: point.fronts for point in points} == {
        "base": {"tokens", "seconds"},
        "slow": {"tokens", "seconds"},
        "long": {"seconds"},
    }
    by_tokens = make_advice(table, points)
    assert [choice.name for choice in by_tokens] == ["base", "slow"]
    by_seconds = make_advice(table, points, cost="seconds")
    assert [(choice.name, choice.cost) for choice in by_seconds] == [
        ("base", 1.0),
        ("long", 2.0),
        ("slow", 9.0),
    ]


def test_two_equal_settings_have_about_equal_chances() -> None:
    generator = np.random.default_rng(3)
    first = generator.normal(1, 1, 100)
    second = generator.normal(1, 1, 100)
    second += first.mean() - second.mean() + 0.01
    gold = {"base": [0.0] * 100, "a": first.tolist(), "b": second.tolist()}
    table, grid = make_table(gold, {"base": 1, "a": 2, "b": 3})
    last = make_advice(table, make_points(table, grid))[-1]
    assert last.name == "b"
    assert 0.4 < last.chance < 0.75
    assert last.cheaper is not None
    assert last.cheaper.name == "a"
    assert last.cheaper.max_loss > 0.1, "not distinguishable does not mean equal"


def test_no_scores_give_no_points() -> None:
    table, grid = make_table({"base": [None]}, {"base": 1})
    assert make_points(table, grid) == []
    assert make_advice(table, []) == []


@pytest.mark.parametrize(
    ("error", "decimals"), [(0.123, 2), (0.0123, 3), (1.5, 1), (42.0, 0), (0.0, 2), (math.nan, 2)]
)
def test_decimals_follow_the_error(error: float, decimals: int) -> None:
    assert Mean(1.0, error).decimals == decimals
