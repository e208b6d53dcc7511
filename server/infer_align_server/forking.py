"""Begin the process of a worker as a fork of its supervisor, where that is safe.

The supervisor has imported the whole server and runs no event loop. So a fork of it starts without
importing anything, and the modules take no memory of their own.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Libraries of other systems do not work in a fork.
METHOD = "fork" if sys.platform == "linux" else "spawn"
# Windows has no SIGHUP.
HANGUP = getattr(signal, "SIGHUP", None)
# The signals that a supervisor handles.
SIGNALS = [number for number in (signal.SIGTERM, signal.SIGINT, HANGUP) if number is not None]


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Hold signals back, so that a new worker gets none before it handles them itself."""
    if METHOD != "fork":
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def reset_signals() -> None:
    """Handle signals as a new process does, in a worker, and receive those that were held back."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if HANGUP is not None:
        # A hangup is the supervisor's: it starts workers with the new configuration.
        signal.signal(HANGUP, signal.SIG_IGN)
    if METHOD == "fork":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
