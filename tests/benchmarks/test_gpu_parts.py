"""The parts of the measurement on a GPU run: the same code, with small models on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import record as recording
from benchmarks.gpu import embedded, held_server, steering, value_lm_pass
from benchmarks.gpu.parts import ROOT
from benchmarks.record import problems

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the records."""
    folder = tmp_path / "results"
    monkeypatch.setattr(recording, "RESULTS", folder)
    monkeypatch.setattr(recording, "commit", lambda: "0123456789ab")
    return folder


def read_record(file: Path) -> dict[str, Any]:
    """Return a record that fits the schema."""
    assert problems(file) == []
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def test_the_embedded_engine_is_measured(results: Path) -> None:
    embedded.main(["--tiny", "--seconds", "0"])
    rows = read_record(results / "gpu_embedded.json")["rows"]
    assert len(rows) == 3
    assert all(row["value"] > 0 for row in rows)


def test_the_pass_of_a_value_lm_is_measured(results: Path) -> None:
    value_lm_pass.main(["--tiny", "--seconds", "0"])
    content = read_record(results / "gpu_value_lm_pass.json")
    (row,) = content["rows"]
    assert row["value"] > 0
    assert content["setup"]["graphs"] == (1 if torch.cuda.is_available() else 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Hold one server for all measurements, as on a GPU."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("held")
    command = [sys.executable, "-m", "benchmarks.gpu.held_server"]
    options = ["--tiny", "--folder", str(folder)]
    for action in ("begin", "start"):
        subprocess.run([*command, action, *options], cwd=ROOT, env=dict(os.environ), check=True)
    yield folder
    server = held_server.find(folder)
    subprocess.run([*command, "stop", *options], cwd=ROOT, env=dict(os.environ), check=True)
    assert server is not None
    assert not server.is_alive()
    assert held_server.find(folder) is None


@pytest.mark.vllm
def test_a_server_that_runs_is_found_again(folder: Path) -> None:
    server = held_server.find(folder)
    assert server is not None
    assert held_server.start(folder, held_server.TINY) == server


@pytest.mark.vllm
def test_values_are_measured_against_plain_decoding(folder: Path, results: Path) -> None:
    tiny = ["--tiny", "--seconds", "0", "--folder", str(folder)]
    steering.main([*tiny, "--concurrency", "2"])
    rows = read_record(results / "gpu_vas_2.json")["rows"]
    assert [row["what"].split(" against")[0] for row in rows] == [
        "one value",
        "two values",
        "four values",
    ]
    steering.main([*tiny, "--best-of", "3"])
    assert len(read_record(results / "gpu_best_of_3.json")["rows"]) == 1
    steering.main([*tiny, "--lookahead", "--concurrency", "2"])
    assert read_record(results / "gpu_lookahead_2.json")["rows"][0]["value"] > 0


def test_without_a_server_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="held_server start"):
        steering.main(["--folder", str(tmp_path)])
