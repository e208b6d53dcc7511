"""How kernels are measured: not on a red test, beside their baselines, against the bytes that must move."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def gate(op: str) -> None:
    """Run the op's tests, the interpreted ones too; refuse to measure on red."""
    tests = [f"tests/kernels/test_{op}.py", "tests/kernels/test_interpreter.py"]
    if subprocess.run(
        [sys.executable, "-m", "pytest", *tests, "-m", "not slow"], cwd=ROOT, check=False
    ).returncode:
        raise SystemExit(f"{op}: its tests are red; nothing is measured.")
    if not CUDA:
        print(
            f"{op}: no CUDA here. Measuring the torch reference on one CPU thread; no figure below is a GPU's."
        )
        torch.set_num_threads(1)


def microseconds(step: Callable[[], Any], rounds: int = 15) -> dict[str, float]:
    """p50 and p90 of one call: device time with a cold L2 on CUDA, process time on CPU."""
    if CUDA:
        from triton.testing import do_bench  # noqa: PLC0415 - needs a driver

        p50, p90 = do_bench(step, warmup=25, rep=200, quantiles=[0.5, 0.9])
        return {"p50_us": round(p50 * 1e3, 2), "p90_us": round(p90 * 1e3, 2)}
    step()
    times = []
    for _ in range(rounds):
        start = process_time()
        step()
        times.append((process_time() - start) * 1e6)
    return {
        "p50_us": round(statistics.median(times), 1),
        "p90_us": round(statistics.quantiles(times, n=10)[-1], 1),
    }


def bandwidth() -> float:
    """Bytes per second of a large copy here, reads and writes counted: what floors are reckoned with."""
    source = torch.empty(2**30 if CUDA else 2**26, dtype=torch.uint8, device=DEVICE).zero_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (microseconds(lambda: target.copy_(source))["p50_us"] * 1e-6)


def row(
    shape: dict[str, Any], variants: dict[str, Callable[[], Any]], floor_bytes: float, copy: float
) -> dict[str, Any]:
    """One line of results: every variant of the same work, measured in turn, and the floor."""
    measured = {name: microseconds(step) for name, step in variants.items()}
    floor = floor_bytes / copy * 1e6
    line = {
        **shape,
        "floor_us": round(floor, 2),
        **{
            f"{name}_{key}": value
            for name, times in measured.items()
            for key, value in times.items()
        },
    }
    print(line)
    return line
