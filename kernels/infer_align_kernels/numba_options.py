"""Set the options with which Numba compiles the functions of this package."""

# Numba has no types.
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llvmlite.binding import ffi

# Numba keeps code until its own file changes. After a change here, change those files too.
#
# Sums may be reordered, so that a processor adds several numbers at once. Every row is summed in
# the same order, so it does not depend on its batch.
COMPILED = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "reassoc"},
    # The code is kept beside its file, where that is possible.
    "cache": os.access(Path(__file__).parent, os.W_OK),
}


def _answer_for_functions_only() -> None:
    """Let llvmlite's library no longer answer for `__dict__`, as if that were one of its functions.

    vLLM's CPU runner looks at `__dict__` of every object in every module, and would fail there.
    """
    library = type(ffi.lib)
    function = getattr(library, "__getattr__", None)
    if function is None:
        return

    def attribute(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return function(self, name)

    library.__getattr__ = attribute


_answer_for_functions_only()
