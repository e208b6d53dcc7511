"""Steering inside vLLM's V2 runner, the one that GPUs use.

Its Triton kernels are interpreted on a CPU, in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vllm.stepping import (
    LOOKAHEAD_STEERINGS,
    MODEL,
    Reference,
    assert_estimates,
    make_lookahead_values,
    make_values,
    mixed_requests,
)

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
ROOT = HERE.parents[2]
PYTHON_PATHS = (HERE / "v2", ROOT, ROOT / "kernels", ROOT / "server", ROOT / "clients/python")
VARIABLES = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "PYTHONPATH": os.pathsep.join(map(str, PYTHON_PATHS)),
}
SPECULATIVE = {
    "speculative_config": {
        "method": "draft_model",
        "model": MODEL,
        "num_speculative_tokens": 2,
        "max_model_len": 512,
    }
}


def run_in_process(
    folder: Path, options: dict[str, Any], n: int, kind: str = "head"
) -> list[dict[str, Any]]:
    """Answer n mixed requests with v2/answer.py; return the fields of each."""
    script = str(HERE / "v2" / "answer.py")
    done = subprocess.run(
        [sys.executable, script, str(folder), json.dumps(options), str(n), kind],
        env={**os.environ, **VARIABLES},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["runner"] == "vllm.v1.worker.cpu.model_runner", "the V2 runner"
    assert result["speculates"] == bool(options)
    requests: list[dict[str, Any]] = result["requests"]
    return requests


@pytest.mark.parametrize("options", [{}, SPECULATIVE], ids=["plain", "speculative"])
def test_the_v2_runner_equals_the_reference(options: dict[str, Any], tmp_path: Path) -> None:
    n = 16
    results = run_in_process(tmp_path, options, n)
    reference = Reference(make_values(tmp_path))
    largest = 0.0
    count = 0
    answered = []
    for request, result in zip(mixed_requests(n), results, strict=True):
        if result["finish_reason"] is None:
            # It was aborted.
            continue
        tokens, logprobs = reference.greedy(request.prompt, request.steering, len(result["tokens"]))
        assert result["tokens"] == tokens
        for actual, expected in zip(result["logprobs"], logprobs, strict=True):
            largest = max(largest, abs(actual - expected))
        count += len(tokens)
        request.tokens = tokens
        request.estimates = dict(result["estimates"])
        answered.append(request)
    if not options:
        # Speculative decoding makes no estimates.
        assert_estimates(answered, reference)
        assert sum(len(request.estimates) for request in answered) >= 10
    print(f"{count} tokens, largest logprob difference {largest:.2g}")
    assert count > 60
    assert largest < 1e-4


def test_lookahead_values_on_the_v2_runner_equal_the_reference(tmp_path: Path) -> None:
    n = 7
    results = run_in_process(tmp_path, {}, n, "lookahead")
    reference = Reference(make_lookahead_values())
    answered = 0
    for request, result in zip(mixed_requests(n, LOOKAHEAD_STEERINGS), results, strict=True):
        if result["finish_reason"] is None:
            # It was aborted.
            continue
        tokens, logprobs = reference.greedy(request.prompt, request.steering, len(result["tokens"]))
        assert result["tokens"] == tokens
        assert result["logprobs"] == pytest.approx(logprobs, abs=1e-4)
        answered += 1
    assert answered >= 5
