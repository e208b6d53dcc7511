"""The smallest request that uses a method, for the tests of all methods."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any


def smallest_align(name: str) -> dict[str, Any]:
    """Return the smallest `align` that uses a method.

    A method with required parameters, or one that needs another method, has it in the constant
    `ALIGN` of its own tests.
    """
    tests = f"tests.methods.test_{name}"
    if importlib.util.find_spec(tests) is None:
        return {name: {}}
    align: dict[str, Any] = getattr(importlib.import_module(tests), "ALIGN", {name: {}})
    return align
