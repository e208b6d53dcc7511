"""Virtual environments beside ours, for clients whose pins would disturb it; `make clients` builds them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "tests/clients/requirements"
ENVIRONMENTS = ROOT / ".venv-clients"


def names() -> list[str]:
    """Those that are described."""
    return sorted(path.stem for path in REQUIREMENTS.glob("*.txt"))


def program(environment: str, name: str = "python") -> str:
    """The path of a program in one of them; without it, the test is skipped with the reason."""
    ready = ENVIRONMENTS / environment / "ready"  # a copy of what is installed there
    if not ready.exists():
        pytest.skip(
            f"{environment} is not installed: `make clients`, with the package index in reach"
        )
    if ready.read_text() != (REQUIREMENTS / f"{environment}.txt").read_text():
        pytest.skip(
            f"{environment} is installed in other versions than {environment}.txt names: `make clients`"
        )
    return str(ENVIRONMENTS / environment / "bin" / name)


def variables() -> dict[str, str]:
    """The process's variables without what would lead into our own packages, and without anything to call home with."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PYTHON", "OPENAI_", "LITELLM", "LANGCHAIN"))
    }
    return {
        **kept,
        "PYTHONPATH": str(ROOT / "clients/python"),
        "NO_PROXY": "*",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "DO_NOT_TRACK": "1",
    }
