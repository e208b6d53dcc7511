"""Standard input and output of a command, also where one is closed or cannot hold a character."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress


def prepare() -> None:
    """Open what was closed before the start, and write what an encoding lacks as an escape."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - open until the end
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A stream whose descriptor was replaced by a pipe may refuse; it then stays as it was.
        with suppress(OSError):
            sys.stdout.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Write what is left of the standard output nowhere: the end of the process would fail."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
