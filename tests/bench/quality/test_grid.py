"""A grid file gives all settings, or an error that names what is wrong."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from infer_align.errors import ConfigError
from infer_align.methods.best_of_n import BestOfN, kl_upper_bound
from infer_align_bench.quality.grid import Cell, read_grid

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
over = { n = [2, 4], objective = ["mean", "uwo"] }
equal_budget = true
[cells.align]
best_of_n = { n = "{n}" }
ensemble = { objective = "{objective}" }
rewards = { "r{n}" = 1 }
list = ["{n}", "x{n}"]
"""


def write(folder: Path, text: str, name: str = "grid.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_cell_stands_for_all_combinations_of_its_values(tmp_path: Path) -> None:
    grid = read_grid(write(tmp_path, GRID))
    assert (grid.baseline, grid.greedy) == ("base", "greedy")
    assert [cell.name for cell in grid.cells] == [
        "base",
        "greedy",
        "best of 2, mean {other}",
        "best of 2, uwo {other}",
        "best of 4, mean {other}",
        "best of 4, uwo {other}",
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


def test_json_and_toml_give_the_same_grid(tmp_path: Path) -> None:
    text = json.dumps(tomllib.loads(GRID))
    from_json = read_grid(write(tmp_path, text, "grid.json"))
    assert from_json == read_grid(write(tmp_path, GRID))


def test_the_shipped_grid_is_valid() -> None:
    grid = read_grid(ROOT / "benchmarks/alignment/demo_grid.toml")
    keys: set[str] = set()
    for cell in grid.cells:
        keys |= set(cell.align or {})
    assert {"best_of_n", "vas", "dpa", "rps", "trust_judge", "ensemble", "rewards"} <= keys
    assert grid.greedy == "greedy"


def test_the_grid_in_the_docs_is_valid(tmp_path: Path) -> None:
    page = (ROOT / "docs/bench.md").read_text(encoding="utf-8")
    block = re.search(r"```toml\n(.*?)```", page, re.DOTALL)
    assert block is not None
    grid = read_grid(write(tmp_path, block[1]))
    assert grid.cells[-1].name == "best of 16, mean"
    assert sum(cell.equal_budget for cell in grid.cells) == 4


@pytest.mark.parametrize(
    ("align", "body", "n"),
    [
        (None, {}, 1),
        ({"best_of_n": {"n": 8}, "ensemble": {}}, {}, 8),
        ({"best_of_n": {}}, {"max_tokens": 3}, BestOfN().n),
    ],
)
def test_best_of_n_has_a_kl_bound(align: Any, body: Any, n: int) -> None:
    assert Cell("x", align, body).kl_bound() == pytest.approx(kl_upper_bound(n))


@pytest.mark.parametrize(
    ("align", "body"),
    [
        ({"vas": {}}, {}),
        ({"best_of_n": {"n": 2}, "dpa": {}}, {}),
        (None, {"temperature": 0}),
    ],
)
def test_other_methods_and_temperatures_have_no_kl_bound(align: Any, body: Any) -> None:
    assert Cell("x", align, body).kl_bound() is None


def test_a_temperature_of_all_requests_removes_every_bound() -> None:
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
        ('baseline = "y"\n[[cells]]\nname = "x"', "baseline: 'y' is not a cell; known: x"),
        (
            'greedy = "gredy"\n[[cells]]\nname = "greedy"',
            "greedy: 'gredy' is not a cell; did you mean 'greedy'?",
        ),
        ("[[cells]]\nalign = {}", "cells[0] needs a name"),
        ('[[cells]]\nname = "x"\nalgn = {}', "cells[0].algn: no such key; did you mean 'align'?"),
        ('[[cells]]\nname = "x"\nalign = 3', "cells[0].align: 3 is not allowed"),
        (
            '[[cells]]\nname = "x"\nover = { n = 3 }',
            "cells[0].over: {'n': 3} is not allowed; must be",
        ),
        ('[[cells]]\nname = "x"\nover = { n = [1, 2] }', "'x' names two cells"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_grid(write(tmp_path, text))
    assert message in caught.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_grid(tmp_path / "none.toml")
