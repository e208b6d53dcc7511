"""Steering inside vLLM's V2 runner, the one that GPUs run: its Triton kernels interpreted on a CPU, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vllm.stepping import MODEL, Reference, assert_estimates, make_values, mixed

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SPECULATIVE = {
    "speculative_config": {
        "method": "draft_model",
        "model": MODEL,
        "num_speculative_tokens": 2,
        "max_model_len": 512,
    }
}


def answer(folder: Path, options: dict[str, Any], n: int) -> list[dict[str, Any]]:
    paths = [
        str(HERE / "v2"),
        str(ROOT),
        *(str(ROOT / part) for part in ("kernels", "server", "clients/python")),
    ]
    settings = {
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [
        sys.executable,
        str(HERE / "v2" / "answer.py"),
        str(folder),
        json.dumps(options),
        str(n),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["runner"] == "vllm.v1.worker.cpu.model_runner", "the runner that was asked for"
    assert said["speculates"] == bool(options)
    found: list[dict[str, Any]] = said["found"]
    return found


@pytest.mark.parametrize("options", [{}, SPECULATIVE], ids=["plain", "speculative"])
def test_equals_the_reference(options: dict[str, Any], tmp_path: Path) -> None:
    n = 16
    found = answer(tmp_path, options, n)
    reference = Reference(make_values(tmp_path))
    worst, compared, answered = 0.0, 0, []
    for ask, said in zip(mixed(n), found, strict=True):
        if said["reason"] is None:  # aborted
            continue
        tokens, logprobs = reference.greedy(ask.prompt, ask.steering, len(said["tokens"]))
        assert said["tokens"] == tokens
        worst = max(worst, *(abs(a - b) for a, b in zip(said["logprobs"], logprobs, strict=True)))
        compared += len(tokens)
        ask.tokens, ask.estimates = said["tokens"], dict(said["estimates"])
        answered.append(ask)
    if not options:  # under speculative decoding nothing is watched
        assert_estimates(answered, reference)
        assert sum(len(ask.estimates) for ask in answered) >= 10
    print(f"{compared} tokens, worst logprob difference {worst:.2g}")
    assert compared > 60
    assert worst < 1e-4
