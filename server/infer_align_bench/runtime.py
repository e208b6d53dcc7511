"""Exit code, event loop, signals and output files of the commands."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from infer_align.errors import ConfigError

# Exit code of an interrupted command: 128 + SIGINT.
INTERRUPTED = 130


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return uvloop's event loop, or asyncio's own where uvloop is not installed (Windows)."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


@contextlib.contextmanager
def stop_on_signals(stop: asyncio.Event) -> Iterator[None]:
    """Let SIGINT and SIGTERM set `stop` instead of ending the process, inside the context."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def check_writable(path: Path) -> None:
    """Check before the measurement that its result can be written to `path`.

    Raises:
        ConfigError: `path` is a folder, is not writable, or its folder does not exist.
    """
    existing = path if path.exists() else path.parent
    if path.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(
            f"{path} cannot be written; must be a writable file in a folder that exists."
        )
