"""A result has its commit, versions, machine, baseline and seed."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record as recording
from benchmarks.record import RESULTS, in_history, problems, record

FILES = sorted(RESULTS.glob("*.json"))
# Results of commits that the history no longer has. A new measurement removes a name.
OUTDATED = {"best_of_n_retrained"}
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
    """The file that `record` writes."""
    monkeypatch.setattr(recording, "RESULTS", tmp_path)
    monkeypatch.setattr(recording, "commit", lambda: "0123456789ab")
    rows = [{"what": "x", "value": math.nan, "each": (1.0, math.inf)}]
    return record("some_thing", baseline="plain decoding", seed=3, rows=rows, setup={"rounds": 7})


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_recorded_result_is_valid(path: Path) -> None:
    assert problems(path) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_measured_commit_is_in_the_history(path: Path) -> None:
    present = in_history(json.loads(path.read_text())["commit"])
    if present is None:
        pytest.skip("there is no complete git history")
    if not present and path.stem in OUTDATED:
        pytest.xfail("the measured commit is gone: measure again")
    assert present
    assert path.stem not in OUTDATED


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit of files of every kind."""
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", str(tmp_path)]
    for name in (
        "infer_align/x.py",
        "infer_align/demo.toml",
        "benchmarks/results/x.json",
        "docs/x.md",
        "constraints.txt",
        "tests/x.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    for command in ("init -q", "add -A", "commit -qm x"):
        subprocess.run([*git, *command.split()], check=True)
    monkeypatch.setattr(recording, "RESULTS", tmp_path / "benchmarks/results")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "marked"),
    [
        ("infer_align/x.py", True),
        ("infer_align/demo.toml", True),
        ("constraints.txt", True),
        ("infer_align/new.py", True),
        ("benchmarks/results/x.json", False),
        ("docs/x.md", False),
        ("tests/x.py", False),
    ],
)
def test_a_relevant_change_marks_the_commit(repository: Path, name: str, marked: bool) -> None:
    clean = recording.commit()
    assert len(clean) == 12
    (repository / name).write_text("after")
    assert recording.commit() == clean + "+changes" * marked
    assert in_history(clean) is True
    assert in_history("0123456789ab") is False


def test_without_a_history_nothing_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "RESULTS", tmp_path / "none")
    assert in_history("0123456789ab") is None


def test_there_are_results() -> None:
    assert len(FILES) >= 8


def test_a_written_result_is_valid(written: Path) -> None:
    assert problems(written) == []
    assert json.loads(written.read_text())["rows"] == [
        {"what": "x", "value": None, "each": [1.0, None]}
    ]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_field_is_refused(written: Path, field: str, value: Any) -> None:
    result = json.loads(written.read_text())
    written.write_text(json.dumps({**result, field: value}))
    assert problems(written)


@pytest.mark.parametrize(
    "field", ["benchmark", "commit", "versions", "machine", "baseline", "seed", "setup", "rows"]
)
def test_a_missing_field_is_refused(written: Path, field: str) -> None:
    result = json.loads(written.read_text())
    del result[field]
    written.write_text(json.dumps(result))
    assert any(field in problem for problem in problems(written))


def test_a_missing_seed_needs_a_reason(written: Path) -> None:
    result = json.loads(written.read_text())
    result |= {"seed": None, "setup": {"no_seed": "nothing is drawn"}}
    written.write_text(json.dumps(result))
    assert problems(written) == []


@pytest.mark.parametrize("text", ["", "{", '{"value": NaN}', "[]"])
def test_a_file_that_is_not_a_result_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    assert problems(tmp_path / "x.json")
