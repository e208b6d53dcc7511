"""These run where TRITON_INTERPRET=1 was set before Triton was imported: see test_interpreter.py beside this folder."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]
