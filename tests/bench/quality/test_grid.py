"""A grid is read whole, or refused by the name of what is wrong."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from infer_align.errors import ConfigError
from infer_align.methods.best_of_n import kl_upper_bound
from infer_align_bench.quality.grid import Cell, read

ROOT = Path(__file__).parents[3]
GRID = """
greedy = "greedy"
[[cells]]
name = "base"
[[cells]]
name = "greedy"
body = { temperature = 0 }
[[cells]]
name = "best of {n}, {objective} {other}"
align = { best_of_n = { n = "{n}" }, ensemble = { objective = "{objective}" }, rewards = { "r{n}" = 1 }, list = ["{n}", "x{n}"] }
over = { n = [2, 4], objective = ["mean", "uwo"] }
equal_budget = true
"""


def write(place: Path, text: str, name: str = "grid.toml") -> Path:
    (place / name).write_text(text)
    return place / name


def test_cells_are_spread_over_their_values(tmp_path: Path) -> None:
    grid = read(write(tmp_path, GRID))
    assert (grid.baseline, grid.greedy) == ("base", "greedy")
    assert [cell.name for cell in grid.cells] == [
        "base",
        "greedy",
        *(f"best of {n}, {o} {{other}}" for n in (2, 4) for o in ("mean", "uwo")),
    ]
    last = grid.cells[-1]
    assert last.equal_budget
    assert last.align == {
        "best_of_n": {"n": 4},
        "ensemble": {"objective": "uwo"},
        "rewards": {"r{n}": 1},
        "list": [4, "x4"],
    }
    assert grid.cells[0].align is None


def test_json_says_the_same(tmp_path: Path) -> None:
    table = tomllib.loads(GRID)
    assert read(write(tmp_path, json.dumps(table), "grid.json")) == read(write(tmp_path, GRID))


def test_the_shipped_grid() -> None:
    grid = read(ROOT / "benchmarks/alignment/demo_grid.toml")
    keys = {key for cell in grid.cells for key in cell.align or {}}
    assert {"best_of_n", "vas", "dpa", "rps", "trust_judge", "ensemble", "rewards"} <= keys
    assert grid.greedy == "greedy"


def test_the_grid_in_the_docs(tmp_path: Path) -> None:
    page = (ROOT / "docs/bench.md").read_text(encoding="utf-8")
    block = re.search(r"```toml\n(.*?)```", page, re.DOTALL)
    assert block is not None
    grid = read(write(tmp_path, block[1]))
    assert [cell.name for cell in grid.cells][-1] == "best of 16, mean"
    assert sum(cell.equal_budget for cell in grid.cells) == 4


@pytest.mark.parametrize(
    ("align", "body", "bound"),
    [
        (None, {}, 0.0),
        ({"best_of_n": {"n": 8}, "ensemble": {}}, {}, kl_upper_bound(8)),
        ({"best_of_n": {}}, {"max_tokens": 3}, kl_upper_bound(8)),
        ({"vas": {}}, {}, None),
        ({"best_of_n": {"n": 2}, "dpa": {}}, {}, None),
        (None, {"temperature": 0}, None),
    ],
)
def test_how_far_a_setting_can_be_from_the_model(
    align: Any, body: Any, bound: float | None
) -> None:
    assert Cell("x", align, body).kl_bound() == (None if bound is None else pytest.approx(bound))


def test_a_temperature_of_the_whole_run_moves_every_setting() -> None:
    assert Cell("x").kl_bound(("max_tokens",)) == 0.0
    assert Cell("x", {"best_of_n": {"n": 4}}).kl_bound(("temperature",)) is None
    assert Cell("x", None, {"temperature": None}).kl_bound() == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no [[cells]]"),
        ("cells = []", "has no [[cells]]"),
        ("[[cells]\n", "grid.toml"),
        (
            'base_line = "x"\n[[cells]]\nname = "x"',
            "base_line: no such key; did you mean 'baseline'?",
        ),
        ('baseline = "y"\n[[cells]]\nname = "x"', "baseline: 'y' is no cell; known: x"),
        (
            'greedy = "gredy"\n[[cells]]\nname = "greedy"',
            "greedy: 'gredy' is no cell; did you mean 'greedy'?",
        ),
        ("[[cells]]\nalign = {}", "cells[0] needs a name"),
        ('[[cells]]\nname = "x"\nalgn = {}', "cells[0].algn: no such key; did you mean 'align'?"),
        ('[[cells]]\nname = "x"\nalign = 3', "cells[0].align: 3 is not allowed"),
        ('[[cells]]\nname = "x"\nover = { n = 3 }', "cells[0].over: must be"),
        ('[[cells]]\nname = "x"\nover = { n = [1, 2] }', "'x' names two cells"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(write(tmp_path, text))
    assert message in caught.value.message


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "none.toml")
