"""Collect these tests only if TRITON_INTERPRET=1 was set before Triton was imported.

tests/kernels/test_interpreter.py runs them that way.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]
