"""A figure counts only with what it takes to doubt it: commit, versions, machine, baseline, seed."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record as recording
from benchmarks.record import RESULTS, known, problems, record

FILES = sorted(RESULTS.glob("*.json"))
# Measured at commits that the history no longer holds; a name leaves when it is measured again.
AGAIN = {
    "bench_agreement",
    "bench_agreement_vllm",
    "best_of_n",
    "best_of_n_retrained",
    "compositions",
    "cost_model",
    "dpa",
    "judge_speed",
    "quality",
    "rps",
    "trust_judge",
    "upstream",
    "vas",
    "vllm",
}
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


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_commit_that_was_measured_is_in_the_history(path: Path) -> None:
    found = known(json.loads(path.read_text())["commit"])
    if found is None:
        pytest.skip("there is no whole git history here to look into")
    if not found and path.stem in AGAIN:
        pytest.xfail("measured at a commit that is gone: to be measured again")
    assert found


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One commit of everything that a figure may depend on."""
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
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
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
def test_a_change_that_matters_marks_the_commit(repository: Path, name: str, marked: bool) -> None:
    clean = recording.commit()
    assert len(clean) == 12
    (repository / name).write_text("after")
    assert recording.commit() == clean + "+changes" * marked
    assert known(clean) is True
    assert known("0123456789ab") is False


def test_without_a_history_nothing_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "RESULTS", tmp_path / "none")
    assert known("0123456789ab") is None


def test_there_are_results() -> None:
    assert len(FILES) >= 8


def test_what_record_writes_is_accepted(written: Path) -> None:
    assert problems(written) == []
    assert json.loads(written.read_text())["rows"] == [
        {"what": "x", "value": None, "each": [1.0, None]}
    ]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_what_is_wrong_is_refused(written: Path, field: str, value: Any) -> None:
    result = json.loads(written.read_text())
    written.write_text(json.dumps({**result, field: value}))
    assert problems(written)


@pytest.mark.parametrize(
    "field", ["benchmark", "commit", "versions", "machine", "baseline", "seed", "setup", "rows"]
)
def test_what_is_missing_is_refused(written: Path, field: str) -> None:
    result = json.loads(written.read_text())
    del result[field]
    written.write_text(json.dumps(result))
    assert any(field in problem for problem in problems(written))


def test_no_seed_needs_a_reason(written: Path) -> None:
    result = json.loads(written.read_text())
    written.write_text(
        json.dumps({**result, "seed": None, "setup": {"no_seed": "nothing is drawn"}})
    )
    assert problems(written) == []


@pytest.mark.parametrize("text", ["", "{", '{"value": NaN}', "[]"])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    assert problems(tmp_path / "x.json")
