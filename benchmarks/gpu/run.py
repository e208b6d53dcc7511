"""Measure on a GPU, whole or in pieces: the kernels, the embedded engine, vLLM with 8B.

    python -m benchmarks.gpu.run                 # everything that has not run at this commit
    python -m benchmarks.gpu.run --seconds 60    # the next parts that fit in 60 seconds

The outcomes are in `benchmarks/results/gpu_parts.json`, the figures of each part in a record of its
own. Without a GPU nothing runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import OUT_OF_TIME, PASSED, Outcome, Part, all_parts, plan, run_part
from benchmarks.record import RESULTS, commit, record

NAME = "gpu_parts"
# A run without a limit tries the parts that ran out of time again: what they have begun goes on,
# and what they have compiled is kept.
TRIES = 3
NO_GPU = "measure-gpu: torch finds no CUDA device here, so nothing was measured."


def read_outcomes(path: Path, current_commit: str) -> dict[str, Outcome]:
    """Return the outcomes of earlier pieces at this commit, by part."""
    if not path.exists():
        return {}
    result: dict[str, Any] = json.loads(path.read_text())
    if result["commit"] != current_commit:
        return {}
    return {row["name"]: Outcome(**row) for row in result["rows"]}


def measure(parts: Iterable[Part], done: dict[str, Outcome], device: str) -> list[Outcome]:
    """Run parts one after the other, and record all outcomes after each."""
    outcomes: list[Outcome] = []
    for part in parts:
        print(f"{part.name}: at most {part.seconds:g} seconds", flush=True)
        outcome = run_part(part, done)
        print(f"{part.name}: {outcome.status} after {outcome.seconds:g} seconds", flush=True)
        outcomes.append(outcome)
        done[part.name] = outcome
        record(
            NAME,
            baseline="none: whether each part passed; its figures are in its own record",
            seed=None,
            rows=[asdict(each) for each in done.values()],
            setup={"device": device, "no_seed": "each part has its own seed"},
        )
    return outcomes


def measure_all(
    parts: Sequence[Part], done: dict[str, Outcome], device: str, seconds: float | None
) -> bool:
    """Run the parts that are left, in one piece if its seconds are limited.

    Returns:
        True if every part that ran has passed, at its last try.
    """
    latest: dict[str, Outcome] = {}
    for _ in range(TRIES if seconds is None else 1):
        outcomes = measure(plan(parts, done, seconds), done, device)
        latest.update({outcome.name: outcome for outcome in outcomes})
        if all(outcome.status != OUT_OF_TIME for outcome in outcomes):
            break
    return all(outcome.status == PASSED for outcome in latest.values())


def device_name() -> str | None:
    """Return the name of the GPU; None without one."""
    import torch  # noqa: PLC0415 - the plan is listed without torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the next piece; return 0 if no part of it failed, or without a GPU."""
    parser = argparse.ArgumentParser(description="Measure on a GPU, whole or in pieces.")
    parser.add_argument("--seconds", type=float, help="length of this piece; default: no limit")
    parser.add_argument("--list", action="store_true", help="list the parts and their limits")
    options = parser.parse_args(arguments)
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds: {options.seconds:g} is not allowed; must be over 0")
    if options.list:
        for part in all_parts():
            print(f"{part.seconds:4g} s  {part.name}")
        return 0
    device = device_name()
    if device is None:
        print(NO_GPU)
        return 0
    done = read_outcomes(RESULTS / f"{NAME}.json", commit())
    return 0 if measure_all(all_parts(), done, device, options.seconds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
