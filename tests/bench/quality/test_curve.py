"""The statistics on made-up answers whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from infer_align_bench.quality.advice import advice, headline
from infer_align_bench.quality.cells import Row
from infer_align_bench.quality.curve import Mean, Point, Table, points
from infer_align_bench.quality.grid import Cell, Grid


def table(
    gold: Mapping[str, object],
    tokens: Mapping[str, float],
    family: tuple[str, ...] = (),
    greedy: str | None = None,
) -> tuple[Table, Grid]:
    """Gold by prompt (a list of draws where there are several) of each setting, and what each answer spends."""
    cells = tuple(Cell(name, {"n": i}, equal_budget=name in family) for i, name in enumerate(gold))
    rows, keys = [], {}
    for name, values in gold.items():
        for prompt, value in enumerate(values):  # type: ignore[arg-type, var-annotated]
            keys[name, prompt] = f"{name}/{prompt}"
            for draw, one in enumerate(value if isinstance(value, list) else [value]):
                rows.append(
                    Row(
                        f"{name}/{prompt}",
                        name,
                        prompt,
                        draw,
                        "",
                        one,
                        tokens[name] / 100,
                        int(tokens[name]),
                        1,
                        0,
                        0,
                    )
                )
    grid = Grid(cells, next(iter(gold)), greedy)
    return Table(grid, rows, keys), grid


def by_name(found: list[Point]) -> dict[str, Point]:
    return {point.cell.name: point for point in found}


def test_errors_are_over_prompts_and_differences_are_paired() -> None:
    chance = np.random.default_rng(0)
    hard = chance.normal(0, 5, 50)  # prompts differ much, the settings little
    noise = chance.normal(0, 0.1, 50)
    made, grid = table(
        {
            "base": hard.tolist(),
            "better": (hard + 1 + noise).tolist(),
            "greedy": (hard - 1).tolist(),
        },
        {"base": 10, "better": 40, "greedy": 8},
        greedy="greedy",
    )
    found = by_name(points(made, grid))
    assert found["base"].gold == Mean(
        pytest.approx(hard.mean()), pytest.approx(hard.std(ddof=1) / math.sqrt(50))
    )
    better = found["better"].minus_baseline
    assert better is not None
    assert better.value == pytest.approx(1 + noise.mean())
    assert better.error == pytest.approx(noise.std(ddof=1) / math.sqrt(50))
    assert better.error < found["better"].gold.error / 20
    assert found["base"].minus_baseline is None
    assert found["greedy"].minus_greedy is None
    assert found["base"].minus_greedy == Mean(pytest.approx(1.0), pytest.approx(0.0, abs=1e-12))
    assert (found["better"].cost("tokens"), found["better"].cost("seconds")) == (
        pytest.approx(40),
        pytest.approx(0.4),
    )


def test_draws_of_a_prompt_are_averaged_first() -> None:
    made, grid = table({"base": [[0.0, 2.0], [3.0, 3.0], [5.0]]}, {"base": 1})
    point = points(made, grid)[0]
    assert point.gold == Mean(
        pytest.approx(3.0), pytest.approx(np.std([1, 3, 5], ddof=1) / math.sqrt(3))
    )
    assert point.prompts == 3


def test_what_was_asked_twice_counts_for_both() -> None:
    rows = [
        Row("same", "a", 0, 0, "", 3.0, 0.1, 1, 1, 0, 0),
        Row("other", "a", 2, 0, "", 5.0, 0.1, 1, 1, 0, 0),
    ]
    keys = {
        ("a", 0): "same",
        ("a", 1): "same",
        ("a", 2): "other",
        ("b", 0): "same",
        ("b", 1): "same",
        ("b", 2): "gone",
    }
    made = Table(Grid((Cell("a"), Cell("b")), "a"), rows, keys)
    np.testing.assert_array_equal(made.gold, [[3, 3, 5], [3, 3, np.nan]])


def test_answers_without_a_score_are_left_out() -> None:
    made, grid = table(
        {"base": [1.0, None, 3.0], "other": [2.0, 2.0, None], "none": [None, None, None]},
        {"base": 1, "other": 2, "none": 3},
    )
    found = by_name(points(made, grid))
    assert set(found) == {"base", "other"}
    assert found["base"].gold.value == 2.0
    assert found["other"].minus_baseline is not None
    assert found["other"].minus_baseline.value == 1.0, "over the one prompt that both have"


def test_at_the_same_tokens() -> None:
    """The family's gold rises by 1 with every doubling: at 20 tokens it is 1, at sqrt(800) it is 1.5."""
    family = {"base": [0.0, 0.2], "b2": [1.0, 1.2], "b4": [2.0, 2.2]}
    others = {"at b2": [2.0, 2.4], "between": [1.5, 1.7], "cheap": [9.0, 9.0], "dear": [9.0, 9.0]}
    tokens = {
        "base": 10,
        "b2": 20,
        "b4": 40,
        "at b2": 20,
        "between": math.sqrt(800),
        "cheap": 5,
        "dear": 100,
    }
    made, grid = table({**family, **others}, tokens, ("b2", "b4"))
    made.tokens[4] = math.sqrt(800)
    found = by_name(points(made, grid))
    assert found["at b2"].minus_equal == Mean(pytest.approx(1.1), pytest.approx(0.1))
    assert found["between"].minus_equal == Mean(
        pytest.approx(0.0, abs=1e-9), pytest.approx(0.0, abs=1e-9)
    )
    assert found["cheap"].minus_equal is None, "there is nothing of its price to compare with"
    assert found["dear"].minus_equal is None
    assert found["b2"].minus_equal is None


def test_the_front_and_what_to_use() -> None:
    chance = np.random.default_rng(1)
    shared, noise = chance.normal(0, 1, 200), chance.normal(0, 1, 200)
    gold = {
        "base": shared,
        "cheap and good": shared + 1,
        "worse and dearer": shared + 0.5,
        "hardly better": shared + 1.01 + noise - noise.mean(),
        "best": shared + 3 + chance.normal(0, 0.5, 200),
    }
    tokens = {
        "base": 10,
        "cheap and good": 12,
        "worse and dearer": 20,
        "hardly better": 40,
        "best": 100,
    }
    made, grid = table({name: values.tolist() for name, values in gold.items()}, tokens)
    found = points(made, grid)
    assert [point.cell.name for point in found] == list(gold), "cheapest first"
    front = [point.cell.name for point in found if point.front]
    assert front == ["base", "cheap and good", "hardly better", "best"]
    given = {one.name: one for one in advice(made, found)}
    assert list(given) == front
    assert given["best"].chance > 0.999
    assert given["best"].cheaper is None
    assert given["best"].held_out == pytest.approx(found[-1].gold.value, abs=0.01), (
        "nothing to be cursed by"
    )
    cheaper = given["hardly better"].cheaper
    assert cheaper is not None
    assert cheaper.name == "cheap and good"
    difference = np.array(gold["hardly better"]) - shared - 1
    assert cheaper.most == pytest.approx(
        difference.mean() + 2 * difference.std(ddof=1) / math.sqrt(200)
    )
    assert given["hardly better"].chance < 0.95
    first = headline(found, "base")
    assert first is not None
    assert first.cheap is not None
    assert [point.cell.name for point in (first.cheap, first.default, first.best)] == [
        "cheap and good",
        "best",
        "best",
    ]


def test_the_best_of_many_alike_is_worth_what_it_is_on_other_prompts() -> None:
    """Twenty settings of the same worth: the best looks better than it is, which half of the prompts does not confirm."""
    chance = np.random.default_rng(6)
    gold = {"base": chance.normal(0, 1, 40)} | {f"s{i}": chance.normal(0, 1, 40) for i in range(20)}
    made, grid = table(
        {name: values.tolist() for name, values in gold.items()},
        {name: 1 + i for i, name in enumerate(gold)},
    )
    last = advice(made, points(made, grid))[-1]
    assert last.gold.value > 0.2
    assert last.held_out < last.gold.value - 0.1


def test_a_setting_that_lacks_a_prompt_is_on_no_front() -> None:
    """Without the hard prompt it looks the best; the others are compared on all prompts all the same."""
    gold = {"base": [0.0, 0.0, -9.0], "good": [1.0, 1.0, -8.0], "lucky": [1.0, 1.0, None]}
    made, grid = table(gold, {"base": 1, "good": 2, "lucky": 3})
    found = by_name(points(made, grid))
    assert found["lucky"].gold.value > found["good"].gold.value
    assert (found["lucky"].missing, found["lucky"].fronts) == (1, frozenset())
    assert found["lucky"].minus_baseline == Mean(1.0, 0.0)
    given = advice(made, list(found.values()))
    assert [one.name for one in given] == ["base", "good"]
    assert given[-1].gold.value == pytest.approx(-2.0)


def test_a_prompt_that_is_still_asked_is_held_against_nobody() -> None:
    made, grid = table(
        {"base": [0.0, 0.0, 1.0], "other": [1.0, 2.0, None]}, {"base": 1, "other": 2}
    )
    made.required[2] = False
    assert by_name(points(made, grid))["other"].front


def test_a_budget_in_seconds_has_a_front_of_its_own() -> None:
    made, grid = table(
        {"base": [0.0, 0.2], "long": [1.0, 1.1], "slow": [2.0, 2.2]},
        {"base": 1, "long": 50, "slow": 20},
    )
    made.seconds[:] = np.array([[1.0], [2.0], [9.0]])
    found = points(made, grid)
    fronts = {point.cell.name: point.fronts for point in found}
    assert fronts == {
        "base": {"tokens", "seconds"},
        "slow": {"tokens", "seconds"},
        "long": {"seconds"},
    }
    assert [one.name for one in advice(made, found)] == ["base", "slow"]
    assert [(one.name, one.cost) for one in advice(made, found, cost="seconds")] == [
        ("base", 1.0),
        ("long", 2.0),
        ("slow", 9.0),
    ]


def test_a_coin_toss_is_said_to_be_one() -> None:
    chance = np.random.default_rng(3)
    gold = {"base": np.zeros(100), "a": chance.normal(1, 1, 100), "b": chance.normal(1, 1, 100)}
    gold["b"] += gold["a"].mean() - gold["b"].mean() + 0.01
    made, grid = table(
        {name: values.tolist() for name, values in gold.items()}, {"base": 1, "a": 2, "b": 3}
    )
    last = advice(made, points(made, grid))[-1]
    assert last.name == "b"
    assert 0.4 < last.chance < 0.75
    assert last.cheaper is not None
    assert last.cheaper.name == "a"
    assert last.cheaper.most > 0.1, "not told apart is not the same as alike"


def test_nothing_measured() -> None:
    made, grid = table({"base": [None]}, {"base": 1})
    assert points(made, grid) == []
    assert advice(made, []) == []


@pytest.mark.parametrize(
    ("error", "digits"), [(0.123, 2), (0.0123, 3), (1.5, 1), (42.0, 0), (0.0, 2), (math.nan, 2)]
)
def test_digits_follow_the_error(error: float, digits: int) -> None:
    assert Mean(1.0, error).decimals == digits
