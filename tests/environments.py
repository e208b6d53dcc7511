"""Virtual environments for clients whose pins conflict with ours; `make clients` builds them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "tests/clients/requirements"
ENVIRONMENTS = ROOT / ".venv-clients"
# Variables that would lead a client to our packages, to an account, or to the network.
PREFIXES = ("PYTHON", "OPENAI_", "LITELLM", "LANGCHAIN")


def names() -> list[str]:
    """Return the environments that have a file of requirements."""
    return sorted(path.stem for path in REQUIREMENTS.glob("*.txt"))


def program(environment: str, name: str = "python") -> str:
    """Return the path of a program in an environment, or skip the test if it is not installed."""
    installed = ENVIRONMENTS / environment / "ready"
    if not installed.exists():
        pytest.skip(f"{environment} is not installed; run `make clients` with the package index")
    if installed.read_text() != (REQUIREMENTS / f"{environment}.txt").read_text():
        pytest.skip(f"{environment} has other versions than {environment}.txt; run `make clients`")
    return str(ENVIRONMENTS / environment / "bin" / name)


def variables() -> dict[str, str]:
    """Return the environment variables for a client's process."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(PREFIXES)}
    return {
        **inherited,
        "PYTHONPATH": str(ROOT / "clients/python"),
        "NO_PROXY": "*",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "DO_NOT_TRACK": "1",
    }
