"""The Triton code runs in Triton's interpreter, in a process of its own: the switch is read when Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("speed", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_triton_code_in_the_interpreter(speed: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(FOLDER),
        "-m",
        speed,
        "-p",
        "no:cacheprovider",
        "--timeout",
        "280",
        "--durations=5",
    ]
    done = subprocess.run(
        command,
        cwd=FOLDER.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
