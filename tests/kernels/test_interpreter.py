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

ROOT = Path(__file__).parents[2]
FOLDERS = ("tests/kernels/interpreted", "tests/engines/transformers/interpreted")
# The steering of the engines, which takes the kernels where they run. Of the engine's tests only
# those that draw few tokens: the interpreter needs about a second for each.
ENGINE = "tests/engines/transformers/test_steering.py"
STEERING = (
    "tests/decoding/test_steering.py",
    "tests/decoding/test_dense_steering.py",
    "tests/decoding/test_siblings.py",
    "tests/values/test_sibling_pass.py::test_what_padding_holds_changes_no_bit_of_the_rows",
    f"{ENGINE}::test_rows_that_are_not_steered_do_not_change",
    f"{ENGINE}::test_weight_zero_is_the_frozen_model",
    f"{ENGINE}::test_likely_tokens_are_steered_by_heads_alone",
)


@pytest.mark.timeout(900)
def test_the_kernels_and_the_steering_pass_their_tests_in_the_interpreter() -> None:
    pytest_command = [sys.executable, "-m", "pytest", *FOLDERS, *STEERING]
    options = ["-p", "no:cacheprovider", "--timeout", "600", "--durations=5"]
    process = subprocess.run(
        [*pytest_command, *options],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
