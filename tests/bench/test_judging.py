"""`bench judge` compares a judge with given preferences, over HTTP."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infer_align.errors import ConfigError
from infer_align_bench import arguments
from infer_align_bench.judging.figures import accuracy

CONFIG = r"""
[engine]
kind = "fake"
labels = [
  {pattern = 'Answer <\d+>\ngood', probabilities = {"90" = 1.0}},
  {pattern = 'Answer <\d+>\nbad', probabilities = {"10" = 1.0}},
  {pattern = 'Answer <\d+>\nodd', probabilities = {"50" = 0.05}},
  {pattern = 'Answer A', probabilities = {B = 0.8, A = 0.1, C = 0.1}},
]
"""


@pytest.fixture(scope="module")
def live(serve: Callable[[str], Any]) -> Any:
    return serve(CONFIG)


def measured(live: Any, tmp_path: Path, records: list[Any], *flags: str) -> tuple[int, Any]:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps(record) for record in records))
    report = tmp_path / "report.json"
    parser = argparse.ArgumentParser()
    arguments.add_commands(parser)
    options = parser.parse_args(
        ["judge", "--pairs", str(pairs), "--base-url", live.base_url, "--json", str(report), *flags]
    )
    code = options.run(options)
    return code, json.loads(report.read_text())


def pair(prompt: str, chosen: str = "good", rejected: str = "bad") -> Any:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_accuracy_and_biases_against_given_preferences(
    live: Any, tmp_path: Path, capsys: Any
) -> None:
    records = [pair("one"), pair("two"), pair("three"), pair("four", "bad", "good")]
    code, report = measured(live, tmp_path, records)
    assert code == 0
    assert report["accuracy"]["scores"]["value"] == 0.75
    assert report["accuracy"]["comparisons"]["value"] == 0.5
    assert report["accuracy"]["comparisons"]["ties"] == 1.0
    assert report["accuracy"]["comparisons"]["verdict"] == "no better than chance"
    assert report["bias"]["position"] == pytest.approx(-0.7)
    assert report["bias"]["order"] == 1.0
    assert report["bias"]["label B"] == pytest.approx(0.8)
    assert report["bias"]["conflict"] == 1.0
    assert report["usage"]["judge_calls"] == 4 * (2 + 2)
    assert "no better than chance" in capsys.readouterr().out


def test_lines_without_a_pair_are_reported(live: Any, tmp_path: Path) -> None:
    _, report = measured(live, tmp_path, [pair("one"), {"prompt": "x", "chosen": "a"}])
    assert report["pairs"] == 1
    assert "line 2" in report["problems"][0]


def test_pairs_that_cannot_be_judged_are_counted(live: Any, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no pair could be judged; first: status 400"):
        measured(live, tmp_path, [pair("one")], "--body", '{"scale": 7}')


def test_pairs_that_are_judged_in_part_are_counted(live: Any, tmp_path: Path, capsys: Any) -> None:
    records = [pair("one"), pair("two", "odd"), pair("three", "good", "odd")]
    code, report = measured(live, tmp_path, records)
    assert code == 0
    assert report["accuracy"]["scores"]["pairs"] == 1
    assert report["accuracy"]["comparisons"]["pairs"] == 3
    (reason,) = report["incomplete"]
    assert report["incomplete"][reason] == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "2 pairs lack a score or a comparison: " in printed


def test_pairs_that_occur_twice_or_in_both_orders_are_counted(live: Any, tmp_path: Path) -> None:
    records = [pair("one"), pair("one"), pair("one", "bad", "good")]
    _, report = measured(live, tmp_path, records)
    repeated, both = report["problems"]
    assert repeated.startswith("1 pairs occur more than once")
    assert both.startswith("1 pairs occur in both orders")


@pytest.mark.parametrize("name", ["messages", "candidates"])
def test_a_body_cannot_replace_the_pairs(live: Any, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"--body: {name} are those of the pairs"):
        measured(live, tmp_path, [pair("one")], "--body", json.dumps({name: []}))


def test_an_empty_file_is_refused(live: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        measured(live, tmp_path, [])


def test_pairs_of_one_prompt_are_one_observation() -> None:
    apart = accuracy([1.0, 1.0, 0.0, 0.0], ["a", "b", "c", "d"])
    together = accuracy([1.0, 1.0, 0.0, 0.0], ["a", "a", "b", "b"])
    assert apart is not None
    assert together is not None
    assert apart.error == pytest.approx(math.sqrt(1 / 12))
    assert apart.error is not None
    assert together.error is not None
    assert together.error > apart.error
    assert accuracy([], []) is None


def test_one_prompt_shows_no_error(live: Any, tmp_path: Path, capsys: Any) -> None:
    _, report = measured(live, tmp_path, [pair("q"), pair("q", "good", "odd one")])
    assert report["accuracy"]["scores"]["error"] is None
    assert "±" not in capsys.readouterr().out
    share = accuracy([1.0] * 30, ["q"] * 30)
    assert share is not None
    assert share.verdict == "no better than chance"


@pytest.mark.parametrize(
    ("right", "verdict"),
    [(50, "no better than chance"), (90, "better than chance"), (10, "worse than chance")],
)
def test_the_verdict_is_said_plainly(right: int, verdict: str) -> None:
    points = [1.0] * right + [0.0] * (100 - right)
    share = accuracy(points, [str(i) for i in range(100)])
    assert share is not None
    assert share.verdict == verdict


@pytest.mark.parametrize(
    ("right", "wrong", "verdict"),
    [
        (2, 0, "no better than chance"),
        (0, 3, "no better than chance"),
        (6, 0, "better than chance"),
        (0, 6, "worse than chance"),
    ],
)
def test_a_few_pairs_that_are_all_right_are_no_proof(right: int, wrong: int, verdict: str) -> None:
    share = accuracy([1.0] * right + [0.0] * wrong, [str(i) for i in range(right + wrong)])
    assert share is not None
    assert share.error == 0
    assert share.verdict == verdict
