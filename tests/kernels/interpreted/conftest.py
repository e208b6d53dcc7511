"""Collect these tests only if TRITON_INTERPRET=1 was set before Triton was imported.

test_interpreter.py in the parent folder runs them that way.
"""

from __future__ import annotations

import os
from typing import Any


def patch_language_once_per_launch() -> None:
    """Keep what the interpreter changes in Triton's language until the launch has ended.

    It changes the language when a launch begins, and in the same way again at every call of a
    device function. The repetition changes nothing and takes half of the time of these tests.
    """
    from triton.runtime import interpreter  # noqa: PLC0415 - only if it interprets

    patch_language = interpreter._patch_lang
    patched_modules: set[int] = set()

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched_modules:
            return None
        patched_modules.add(module)
        scope = patch_language(function)
        restore = scope.restore

        def restore_after_launch() -> None:
            patched_modules.clear()
            restore()

        # The scope of a launch is restored, those of the calls of device functions never.
        scope.restore = restore_after_launch
        return scope

    interpreter._patch_lang = patch_once


if os.environ.get("TRITON_INTERPRET") == "1":
    patch_language_once_per_launch()
else:
    collect_ignore_glob = ["*"]
