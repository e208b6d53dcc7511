"""Measure kernels next to their baselines, and compute the lower bound of their time.

A kernel is measured only if its tests pass. The shapes of its targets come first, and the record is
written after each shape: what has been measured is kept if the time is over.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic, perf_counter, process_time
from typing import Any

import torch

from benchmarks.record import record

ROOT = Path(__file__).parents[2]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
SEED = 0
CPU_ROUNDS = 15
HOST_ROUNDS = 50
# Larger than the caches of the device.
COPY_BYTES = 2**30 if CUDA else 2**26
# Milliseconds of one measurement. A replayed graph takes ten times GRAPH_MS.
WARMUP_MS = 10
BENCH_MS = 60
GRAPH_MS = 10

Rows = list[dict[str, Any]]


def require_passing_tests(op: str) -> None:
    """Run the tests of an op, the interpreted ones too, and exit if one fails."""
    tests = [f"tests/kernels/test_{op}.py", "tests/kernels/test_interpreter.py"]
    command = [sys.executable, "-m", "pytest", *tests]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise SystemExit(f"{op}: its tests fail, so nothing is measured. Fix them first.")
    if not CUDA:
        print(
            f"{op}: CUDA is not available. The torch reference is measured on one CPU thread. "
            "These are not times of a GPU."
        )
        torch.set_num_threads(1)


def microseconds(step: Callable[[], Any]) -> dict[str, float]:
    """Return p50 and p90 of one call: device time with a cold L2 on CUDA, process time on CPU.

    On CUDA, "graph_us" is the device time of a graph's replay, without launches, and "cpu_us" the
    time that the host spends on a call.
    """
    if CUDA:
        from triton.testing import do_bench  # noqa: PLC0415 - needs a driver

        p50, p90 = do_bench(step, warmup=WARMUP_MS, rep=BENCH_MS, quantiles=[0.5, 0.9])
        times_us = {"p50_us": p50 * 1e3, "p90_us": p90 * 1e3, "cpu_us": host_microseconds(step)}
        graph_us = graph_microseconds(step)
        if graph_us is not None:
            times_us["graph_us"] = graph_us
        return {name: round(value, 2) for name, value in times_us.items()}
    step()
    times = []
    for _ in range(CPU_ROUNDS):
        start = process_time()
        step()
        times.append((process_time() - start) * 1e6)
    p90 = statistics.quantiles(times, n=10)[-1]
    return {"p50_us": round(statistics.median(times), 1), "p90_us": round(p90, 1)}


def host_microseconds(step: Callable[[], Any]) -> float:
    """Return the median time that the host spends on a call, without waiting for the device."""
    times = []
    for _ in range(HOST_ROUNDS):
        torch.cuda.synchronize()
        start = perf_counter()
        step()
        times.append((perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def graph_microseconds(step: Callable[[], Any]) -> float | None:
    """Return the device time of a call replayed as a graph; None if it cannot be captured."""
    from triton.testing import do_bench_cudagraph  # noqa: PLC0415 - needs a driver

    try:
        milliseconds: float = do_bench_cudagraph(step, rep=GRAPH_MS, return_mode="median")
    except RuntimeError:
        # A call that waits for the device has no graph.
        return None
    return milliseconds * 1e3


def copy_bandwidth() -> float:
    """Measure the bytes per second of a large copy, reads and writes counted."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE).zero_()
    target = torch.empty_like(source)
    seconds = microseconds(lambda: target.copy_(source))["p50_us"] * 1e-6
    return 2 * source.numel() / seconds


def measure_row(
    shape: Mapping[str, Any],
    variants: Mapping[str, Callable[[], Any]],
    moved_bytes: float,
    bandwidth: float,
) -> dict[str, Any]:
    """Measure several variants of the same work, one after the other.

    Args:
        shape: sizes of the problem, for the row.
        variants: the calls to measure.
        moved_bytes: bytes that the work must move at least.
        bandwidth: bytes per second, from `copy_bandwidth`.

    Returns:
        The shape, the lower bound of the time, and p50 and p90 of each variant.
    """
    line: dict[str, Any] = {**shape, "floor_us": round(moved_bytes / bandwidth * 1e6, 2)}
    for name, step in variants.items():
        for key, value in microseconds(step).items():
            line[f"{name}_{key}"] = value
    print(line)
    return line


def record_shapes(
    op: str,
    baseline: str,
    shapes: Sequence[tuple[Any, ...]],
    measure_shape: Callable[..., Rows],
    arguments: Sequence[str] | None = None,
) -> Path:
    """Measure an op in several shapes, if its tests pass, and write the results after each.

    Args:
        op: name of the op, of its tests and of the results.
        baseline: what it is compared with, for the results.
        shapes: the sizes of each problem, those of the targets first.
        measure_shape: measures one shape and returns its rows; it gets the sizes and the bytes per
            second of a copy.
        arguments: of the command line, see `_options`.
    """
    options = _options(op, arguments)
    if not options.tested:
        require_passing_tests(op)
    started = monotonic()
    bandwidth = copy_bandwidth()
    lines: Rows = []
    path = Path()
    for number, shape in enumerate(shapes, start=1):
        shape_started = monotonic()
        lines += measure_shape(*shape, bandwidth)
        now = monotonic()
        # The next shape is expected to take as long as this one.
        is_last = now - started + (now - shape_started) > options.seconds
        left_out = shapes[number:] if is_last else ()
        path = record(
            f"kernels_{op}_{DEVICE.type}",
            baseline=baseline,
            seed=SEED,
            rows=lines,
            setup={**setup(bandwidth), "left_out": [str(each) for each in left_out]},
        )
        if is_last:
            break
    print(path)
    return path


def _options(op: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"Measure the kernels of {op}.")
    parser.add_argument("--tested", action="store_true", help="the tests have run before")
    parser.add_argument("--seconds", type=float, default=math.inf, help="default: no limit")
    return parser.parse_args(arguments)


def setup(bandwidth: float) -> dict[str, Any]:
    """Describe the device and the dtype of a run."""
    device = "one CPU thread, the torch reference; no CUDA here"
    if CUDA:
        device = torch.cuda.get_device_name()
    return {"device": device, "dtype": str(DTYPE), "copy_bytes_per_s": round(bandwidth)}
