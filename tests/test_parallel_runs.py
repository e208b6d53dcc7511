"""A test that failed in a parallel run is run once more, alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOOKS = """
from tests.conftest import pytest_collection_modifyitems, pytest_runtest_logreport
"""
TESTS = """
import pytest

@pytest.mark.parametrize("name", ["a@b", "c"])
def test_fails(name):
    assert name == "c"

def test_passes():
    pass
"""


def run(folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "pytest", "--rootdir", str(folder), *options]
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    # A worker of this run is no worker of that one.
    for name in [name for name in variables if name.startswith("PYTEST_")]:
        del variables[name]
    ended = subprocess.run(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, text=True, check=False
    )
    return ended.stdout


def test_the_tests_that_failed_in_parallel_are_found_again(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(HOOKS, encoding="utf-8")
    (tmp_path / "test_some.py").write_text(TESTS, encoding="utf-8")
    parallel = run(tmp_path, "--numprocesses", "1", "--dist", "loadgroup")
    assert "1 failed, 2 passed" in parallel
    assert "FAILED test_some.py::test_fails[a@b] - " in parallel
    again = run(tmp_path, "--last-failed", "--last-failed-no-failures", "none")
    assert "1 failed" in again
    assert "passed" not in again
