"""Try what a client asks for in a copy of this process, which may fail in place of it.

A grammar of a few bytes can ask for gigabytes, for hours, or for a deeper stack than there is. The
library that compiles it ends the process then.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import resource
import select
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

log = logging.getLogger(__name__)

CPU_SECONDS = 2
MEMORY_BYTES = 2**30
# Longer than the computing takes on a busy machine. It ends a copy that waits for a lock.
WALL_SECONDS = 30.0
TOO_MUCH = (
    f"it takes over {CPU_SECONDS} seconds of computing, "
    f"over {MEMORY_BYTES // 2**30} GiB of memory, or too deep a recursion"
)
_SIZE = Path("/proc/self/statm")
Task = Callable[[], str | None]


def failure(task: Task) -> str | None:
    """Run a task in a copy of this process, within limits.

    Args:
        task: Returns what is wrong, or None. It may use the memory and the files of this process,
            and no other thread of it.

    Returns:
        What the task returns, or `TOO_MUCH`. None if this machine has no room for a copy.
    """
    reading, writing = os.pipe()
    try:
        child = _copy()
    except OSError as error:
        os.close(reading)
        os.close(writing)
        log.warning("no process could be started to try a request in: %s", error.strerror)
        return None
    if child == 0:
        _run(task, writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        # Unlike `select`, it takes any file number, and a server with many clients has large ones.
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        if not poll.poll(WALL_SECONDS * 1000):
            os.kill(child, signal.SIGKILL)
        answer = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return answer or None if status == 0 else TOO_MUCH


def _copy() -> int:
    """Copy this process; return 0 in the copy, and the id of the copy here."""
    with warnings.catch_warnings():
        # Python warns of copies of processes with threads. The copy uses none of their locks.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _run(task: Task, writing: int) -> NoReturn:
    """Run the task in the copy, send its result, and end the copy without any cleaning up."""
    status = 1
    try:
        # A library that ends the process says so there, and Python says where it was.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        faulthandler.disable()
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        if _SIZE.exists():
            pages = int(_SIZE.read_text(encoding="ascii").split()[0])
            limit = pages * resource.getpagesize() + MEMORY_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        os.write(writing, (task() or "").encode())
        status = 0
    finally:
        os._exit(status)
