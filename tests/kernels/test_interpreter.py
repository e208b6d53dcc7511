"""Run the tests of the Triton code in Triton's interpreter.

They need a process of their own, because the interpreter is chosen when Triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.timeout(300)
def test_the_triton_code_passes_its_tests_in_the_interpreter() -> None:
    pytest_command = [sys.executable, "-m", "pytest", str(FOLDER)]
    options = ["-p", "no:cacheprovider", "--timeout", "280", "--durations=5"]
    process = subprocess.run(
        [*pytest_command, *options],
        cwd=FOLDER.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
