"""The measurement on a GPU: its plan, its time limits and what it does without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import record as recording
from benchmarks.gpu import run
from benchmarks.gpu.parts import (
    BLOCKED,
    FAILED,
    OUT_OF_TIME,
    PASSED,
    ROOT,
    Outcome,
    Part,
    all_parts,
    plan,
    run_part,
)

PARTS = tuple(Part(name, (), seconds) for name, seconds in (("a", 40.0), ("b", 20.0), ("c", 50.0)))


def names(parts: tuple[Part, ...]) -> str:
    return "".join(part.name for part in parts)


def test_a_piece_holds_the_parts_that_fit() -> None:
    assert names(plan(PARTS, {}, None)) == "abc"
    assert names(plan(PARTS, {}, 60)) == "ab"
    assert names(plan(PARTS, {}, 1)) == "a", "the first part runs in any case"


def test_a_part_runs_again_only_if_it_ran_out_of_time() -> None:
    done = {
        "a": Outcome("a", PASSED, 1.0),
        "b": Outcome("b", OUT_OF_TIME, 20.0),
        "c": Outcome("c", FAILED, 2.0),
    }
    assert names(plan(PARTS, done, 60)) == "b"


def test_a_part_ends_as_its_process_or_at_its_limit() -> None:
    assert run_part(Part("good", ("-c", "pass"), 60), {}).status == PASSED
    assert run_part(Part("bad", ("-c", "raise SystemExit(3)"), 60), {}).status == FAILED
    endless = "import threading; threading.Event().wait()"
    assert run_part(Part("endless", ("-c", endless), 0.2), {}).status == OUT_OF_TIME


def test_a_part_that_ran_out_of_time_is_tried_again_unless_the_piece_is_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "RESULTS", tmp_path)
    monkeypatch.setattr(recording, "commit", lambda: "0123456789ab")
    # Waits at its first run, as for a server that is still starting.
    code = (
        "import pathlib, threading; f = pathlib.Path({!r}); begun = f.exists(); f.touch(); "
        "begun or threading.Event().wait()"
    )
    for folder, seconds in (("whole", None), ("piece", 90.0)):
        waits = code.format(str(tmp_path / folder))
        parts = [Part("start", ("-c", waits), 5), Part("speed", ("-c", "pass"), 60, needs="start")]
        done: dict[str, Outcome] = {}
        is_passed = run.measure_all(parts, done, "a GPU", seconds)
        assert is_passed == (seconds is None)
        assert done["speed"].status == (PASSED if seconds is None else BLOCKED)


def test_no_speed_is_measured_on_a_red_test() -> None:
    part = Part("speed", ("-c", "pass"), 60, needs="tests")
    assert run_part(part, {}).status == BLOCKED
    assert run_part(part, {"tests": Outcome("tests", FAILED, 1.0)}).status == BLOCKED
    assert run_part(part, {"tests": Outcome("tests", PASSED, 1.0)}).status == PASSED


def test_each_part_fits_in_a_minute_and_exists() -> None:
    parts = all_parts()
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        assert 0 < part.seconds <= 60
        for argument in part.arguments:
            if argument.startswith("benchmarks."):
                assert (ROOT / f"{argument.replace('.', '/')}.py").exists()
            elif argument.startswith("tests/"):
                assert (ROOT / argument).exists()


def test_outcomes_count_for_their_commit_alone(tmp_path: Path) -> None:
    path = tmp_path / "gpu_parts.json"
    assert run.read_outcomes(path, "abc") == {}
    rows = [{"name": "a", "status": PASSED, "seconds": 1.5}]
    path.write_text(json.dumps({"commit": "abc", "rows": rows}))
    assert run.read_outcomes(path, "abc") == {"a": Outcome("a", PASSED, 1.5)}
    assert run.read_outcomes(path, "abcd") == {}


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if run.device_name() is not None:
        pytest.skip("there is a GPU")
    assert run.main([]) == 0
    assert capsys.readouterr().out == f"{run.NO_GPU}\n"


def test_the_parts_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list"]) == 0
    assert "measure sibling_attention" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run.main(["--seconds", "0"])
    assert "--seconds: 0 is not allowed" in capsys.readouterr().err
