"""One schema for every result: what was measured, beside which baseline, on what, at which commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "fastapi", "uvicorn", "numpy", "triton")


def record(name: str, *, baseline: str, seed: int | None, rows: list[dict[str, Any]], setup: dict[str, Any]) -> Path:
    """Write `results/<name>.json`; every row must have been measured in this run, its baseline too."""
    result = {
        "benchmark": name,
        "commit": commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": machine(),
        "baseline": baseline,
        "seed": seed,
        "setup": setup,
        "rows": rows,
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def commit() -> str:
    """The commit that was measured, marked when the tree differs from it."""
    git = ["git", "-C", str(RESULTS.parent)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    dirty = subprocess.run([*git, "status", "--porcelain", "--", "*.py"], capture_output=True, text=True, check=True).stdout.strip()
    return head + ("+changes" if dirty else "")


def machine() -> str:
    """Processor and cores, without anything that names the machine."""
    try:
        model = next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
