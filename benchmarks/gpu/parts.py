"""The parts of the measurement on a GPU: commands, each with a time limit of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PASSED = "passed"
FAILED = "failed"
OUT_OF_TIME = "out of time"
BLOCKED = "blocked"
TESTS = "tests of the kernels"
GRAPHS = "tests of the graphs of a value LM"
BEGIN = "write an 8B model and begin to start vLLM"
START = "wait for vLLM"
KERNELS = ("top_candidates", "steer_logits", "value_reweight", "sibling_attention")
CONCURRENCIES = (1, 32, 256)
# These tests compute on the GPU where there is one.
STEERING_TESTS = (
    "tests/decoding/test_steering.py",
    "tests/decoding/test_dense_steering.py",
    "tests/decoding/test_kl_limit.py",
    "tests/decoding/test_siblings.py",
)
GRAPH_TESTS = "tests/values/test_graphs_on_gpu.py"
ENGINE_TESTS = "tests/engines/transformers/test_steering.py"
# Seconds of the time limit that a part measures. The rest is for imports and compilers.
MEASURED_SECONDS = "35"


@dataclass(frozen=True, slots=True)
class Part:
    """One command of the measurement.

    Attributes:
        name: of the part.
        arguments: of the Python interpreter.
        seconds: its time limit.
        needs: name of the part that has to pass first; "" if there is none.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    needs: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one part: how it ended, and its duration in seconds."""

    name: str
    status: str
    seconds: float


def all_parts() -> tuple[Part, ...]:
    """Return the parts in the order in which they run. Each fits in 60 seconds.

    The server of vLLM takes longer to start. It goes on starting when its part runs out of time,
    and the next piece waits for it (held_server.py).
    """
    parts = [
        _tests(TESTS, "tests/kernels/test_on_gpu.py"),
        _tests("tests of steering", *STEERING_TESTS),
        _tests(GRAPHS, GRAPH_TESTS),
        _tests("tests of the embedded engine", ENGINE_TESTS),
    ]
    for kernel in KERNELS:
        script = f"benchmarks.kernels.bench_{kernel}"
        options = ("--tested", "--seconds", MEASURED_SECONDS)
        parts.append(Part(f"measure {kernel}", ("-m", script, *options), 60.0, TESTS))
    parts.append(
        Part("measure the embedded engine", ("-m", "benchmarks.gpu.embedded"), 60.0, TESTS)
    )
    arguments = ("-m", "benchmarks.gpu.value_lm_pass", "--seconds", MEASURED_SECONDS)
    parts.append(Part("measure the pass of a value LM", arguments, 60.0, GRAPHS))
    return (*parts, *_vllm_parts())


def _tests(name: str, *paths: str) -> Part:
    return Part(name, ("-m", "pytest", "-q", "-n", "0", *paths), 60.0)


def _vllm_parts() -> list[Part]:
    server = "benchmarks.gpu.held_server"
    parts = [
        Part(BEGIN, ("-m", server, "begin"), 60.0, TESTS),
        Part(START, ("-m", server, "start"), 60.0, BEGIN),
    ]
    measurements: list[tuple[str, ...]] = []
    for concurrency in CONCURRENCIES:
        measurements.append(("--concurrency", str(concurrency)))
    measurements.append(("--best-of", "8"))
    measurements.append(("--lookahead", "--concurrency", "32"))
    for options in measurements:
        arguments = ("-m", "benchmarks.gpu.steering", *options)
        parts.append(Part(f"measure vLLM {' '.join(options)}", arguments, 60.0, START))
    # A server that is still starting is not stopped.
    parts.append(Part("stop vLLM", ("-m", server, "stop"), 30.0, START))
    return parts


def plan(
    parts: Sequence[Part], done: Mapping[str, Outcome], seconds: float | None
) -> tuple[Part, ...]:
    """Return the parts that run now.

    Args:
        parts: all parts, in order.
        done: the outcomes of earlier pieces; a part that passed or failed does not run again.
        seconds: the length of this piece; None for no limit. The limits of the parts add up to at
            most this, but the first part runs in any case.
    """
    chosen: list[Part] = []
    total = 0.0
    for part in parts:
        outcome = done.get(part.name)
        if outcome is not None and outcome.status in {PASSED, FAILED}:
            continue
        total += part.seconds
        if chosen and seconds is not None and total > seconds:
            break
        chosen.append(part)
    return tuple(chosen)


def run_part(part: Part, done: Mapping[str, Outcome]) -> Outcome:
    """Run a part in a process of its own, and end it at its limit.

    A part whose needed part has not passed does not run: no speed is reported on a red test.
    """
    if part.needs and (part.needs not in done or done[part.needs].status != PASSED):
        return Outcome(part.name, BLOCKED, 0.0)
    start = time.monotonic()
    try:
        process = subprocess.run(
            [sys.executable, *part.arguments], cwd=ROOT, check=False, timeout=part.seconds
        )
        status = FAILED if process.returncode else PASSED
    except subprocess.TimeoutExpired:
        status = OUT_OF_TIME
    return Outcome(part.name, status, round(time.monotonic() - start, 1))
