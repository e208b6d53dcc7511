"""One worker: a process that serves on a socket of its supervisor, and answers its pings.

The supervisor and a worker talk over a pipe. The worker sends a `Report` when it is ready or has
failed, and one for each ping. If the pipe breaks, the supervisor is gone, and the worker ends too.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any

from prometheus_client.values import close_all_multiprocess_files
from rich.console import Console

from infer_align.config.config import Config
from infer_align.errors import ConfigError
from infer_align_server import logs
from infer_align_server.app import create_app
from infer_align_server.forking import reset_signals
from infer_align_server.metrics import share_metrics
from infer_align_server.serve import (
    RunningServer,
    loop_factory,
    server_url,
    show_progress,
)
from infer_align_server.service import Service
from infer_align_server.sharing import Sharing
from infer_align_server.welcome import print_welcome

# The exit status of a worker that could not start.
FAILED = 3
# The gauges of a worker are as old as this at most, in seconds, when another worker reports them.
REFRESH_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Report:
    """A message of a worker to its supervisor.

    Attributes:
        kind: "ready", "failed" or "pong".
        message: Why it failed.
    """

    kind: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class WorkerTask:
    """The work of a worker.

    Attributes:
        config: The configuration.
        sharing: What it shares with the other workers.
        is_first: True for the first worker of a server. It answers /health while it loads, and
            prints the start screen.
        width: The width of the start screen in columns.
    """

    config: Config
    sharing: Sharing
    is_first: bool
    width: int


def run_worker(
    task: WorkerTask,
    listener: socket.socket,
    pipe: Connection[Any, Any],
    inherited: Sequence[socket.socket | Connection[Any, Any]],
) -> None:
    """Serve until the supervisor says SIGTERM or is gone, then end the process.

    Args:
        task: The work.
        listener: The socket that it serves on.
        pipe: The worker's end of the pipe.
        inherited: What a fork has of the supervisor and of other workers. It is closed: a pipe
            breaks only if no process holds its other end, and a socket that nobody serves on
            would keep the address in use.
    """
    for each in inherited:
        each.close()
    reset_signals()
    share_metrics(task.sharing.folder)
    server = task.config.server
    logs.configure(server.log_level, task.config.secrets(), os.getpid())
    status = FAILED
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            status = runner.run(_serve(task, listener, pipe))
    except ConfigError as error:
        pipe.send(Report("failed", error.message))
    except KeyboardInterrupt:
        # uvicorn raises SIGINT again after the drain.
        status = 0
    finally:
        # A worker that could not start has not begun to serve on it.
        listener.close()
        close_all_multiprocess_files()
    sys.exit(status)


async def _serve(task: WorkerTask, listener: socket.socket, pipe: Connection[Any, Any]) -> int:
    start = monotonic()
    out, err = Console(width=task.width), Console(stderr=True)
    screen = err if err.is_terminal else out
    progress_screen = err if task.is_first else Console(stderr=True, force_terminal=False)
    with show_progress(progress_screen) as progress:
        app = create_app(task.config, progress, task.sharing, load_first=not task.is_first)
        running = await RunningServer.start(app, listener)
    if running.ready:
        _answer_pings(running, pipe)
        if task.is_first:
            print_welcome(running.service, server_url(listener), monotonic() - start, screen)
        pipe.send(Report("ready"))
    refreshing = asyncio.create_task(_refresh(running.service))
    try:
        return await running.wait()
    finally:
        refreshing.cancel()


def _answer_pings(running: RunningServer, pipe: Connection[Any, Any]) -> None:
    """Answer each ping, in the event loop that serves; end the server if the pipe breaks."""
    loop = asyncio.get_running_loop()

    def answer() -> None:
        try:
            pipe.recv()
            pipe.send(Report("pong"))
        except (EOFError, OSError):
            loop.remove_reader(pipe.fileno())
            running.stop()

    loop.add_reader(pipe.fileno(), answer)


async def _refresh(service: Service) -> None:
    """Write the gauges for the other workers, once in a while."""
    while True:
        service.metrics.refresh()
        await asyncio.sleep(REFRESH_SECONDS)
