"""`infer-align bench` in a fork that lacks a package."""

from __future__ import annotations

import sys
from typing import Any

from tests.server.processes import command


def command_without(package: str, arguments: list[str]) -> None:
    """Run a command as if a package were not installed."""
    modules: dict[str, Any] = sys.modules
    modules[package] = None
    command(arguments)


def without_matplotlib(arguments: list[str]) -> None:
    command_without("matplotlib", arguments)


def without_uvloop(arguments: list[str]) -> None:
    command_without("uvloop", arguments)
