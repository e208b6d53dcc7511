"""The names that benchmarks import from this project exist. Most benchmarks run rarely."""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("infer_align", "infer_align_kernels", "infer_align_server", "infer_align_bench")


def imported_names() -> set[tuple[str, str]]:
    """Return each module of this project with a name that a benchmark imports from it."""
    names: set[tuple[str, str]] = set()
    for path in (ROOT / "benchmarks").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module is not None and module.partition(".")[0] in OURS:
                names.update((module, alias.name) for alias in node.names)
    return names


@pytest.mark.slow
def test_names_that_benchmarks_import_exist() -> None:
    missing = []
    for module, name in sorted(imported_names()):
        # The adapters of vLLM can be imported only where it is installed.
        if module.startswith("infer_align.vllm") and find_spec("vllm") is None:
            continue
        imported = import_module(module)
        is_package = hasattr(imported, "__path__")
        is_submodule = is_package and find_spec(f"{module}.{name}") is not None
        if not is_submodule and not hasattr(imported, name):
            missing.append(f"{module}: {name}")
    assert missing == []
