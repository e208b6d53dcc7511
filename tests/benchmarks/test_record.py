"""A figure counts only with what it takes to doubt it: commit, versions, machine, baseline, seed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record as recording
from benchmarks.record import RESULTS, problems, record

FILES = sorted(RESULTS.glob("*.json"))
WRONG: list[tuple[str, Any]] = [
    ("commit", ""),
    ("commit", "main"),
    ("versions", {}),
    ("versions", {"python": "3.11.7"}),
    ("versions", {"torch": "2.13", "numpy": "2"}),
    ("machine", ""),
    ("baseline", ""),
    ("baseline", None),
    ("seed", None),
    ("seed", "0"),
    ("setup", []),
    ("rows", []),
    ("rows", [{}]),
    ("benchmark", "another"),
]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `record` writes here and now."""
    monkeypatch.setattr(recording, "RESULTS", tmp_path)
    monkeypatch.setattr(recording, "commit", lambda: "0123456789ab")
    rows = [{"what": "x", "value": math.nan, "each": (1.0, math.inf)}]
    return record("some_thing", baseline="plain decoding", seed=3, rows=rows, setup={"rounds": 7})


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_recorded_result_says_what_it_must(path: Path) -> None:
    assert problems(path) == []


def test_there_are_results() -> None:
    assert len(FILES) >= 8


def test_what_record_writes_is_accepted(written: Path) -> None:
    assert problems(written) == []
    assert json.loads(written.read_text())["rows"] == [{"what": "x", "value": None, "each": [1.0, None]}]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_what_is_wrong_is_refused(written: Path, field: str, value: Any) -> None:
    result = json.loads(written.read_text())
    written.write_text(json.dumps({**result, field: value}))
    assert problems(written)


@pytest.mark.parametrize("field", ["benchmark", "commit", "versions", "machine", "baseline", "seed", "setup", "rows"])
def test_what_is_missing_is_refused(written: Path, field: str) -> None:
    result = json.loads(written.read_text())
    del result[field]
    written.write_text(json.dumps(result))
    assert any(field in problem for problem in problems(written))


def test_no_seed_needs_a_reason(written: Path) -> None:
    result = json.loads(written.read_text())
    written.write_text(json.dumps({**result, "seed": None, "setup": {"no_seed": "nothing is drawn"}}))
    assert problems(written) == []


@pytest.mark.parametrize("text", ["", "{", '{"value": NaN}', "[]"])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    assert problems(tmp_path / "x.json")
