"""`infer-align serve`: the application under uvicorn.

It shows the progress of loading, and finishes running requests on SIGTERM. On a terminal, a bar and
the start screen are shown on standard error. Without a terminal, standard error is a log of JSON
alone: the progress is logged, and the start screen goes to standard output.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context
from dataclasses import dataclass
from time import monotonic
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from infer_align.config.config import Config
from infer_align.errors import AlignError, ConfigError, quote
from infer_align_server import logs
from infer_align_server.app import create_app
from infer_align_server.service import Service
from infer_align_server.welcome import print_welcome
from infer_align_server.wire.protocol import BoundedProtocol

log = logging.getLogger("infer_align")

# Maximum number of connections that wait to be accepted.
BACKLOG = 2048


class DrainingServer(uvicorn.Server):  # type: ignore[misc]
    """A server that makes /ready fail at the first signal, while running requests finish."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        """Make the server in the event loop that will run it."""
        super().__init__(config)
        self._service = service
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start to drain on SIGTERM or SIGINT; a second SIGINT ends the process at once."""
        # The signal may interrupt a write to standard error, and draining writes to the log. A
        # write inside a write fails, so the drain begins in the next round of the event loop. It
        # belongs to no request, so it does not inherit the context of the interrupted one.
        self._loop.call_soon_threadsafe(self._service.drain, context=Context())
        super().handle_exit(sig, frame)
        # uvicorn raises the captured signals again after the drain. Remove SIGTERM, so that the
        # exit status is 0.
        while signal.SIGTERM in self._captured_signals:
            self._captured_signals.remove(signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that listens, with its loaded service.

    Attributes:
        service: The service.
        ready: False if a signal arrived before the models were loaded.
    """

    service: Service
    ready: bool
    _server: DrainingServer
    _serving: asyncio.Task[None]

    @classmethod
    async def start(cls, app: FastAPI, listener: socket.socket) -> RunningServer:
        """Serve an application on a socket, and wait until its service has loaded its models.

        Raises:
            ConfigError: The models could not be loaded.
        """
        service: Service = app.state.service
        server = DrainingServer(_uvicorn_config(service.config, app), service)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        settled = asyncio.create_task(service.settled.wait())
        await asyncio.wait({serving, settled}, return_when=asyncio.FIRST_COMPLETED)
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        is_settled = settled.done()
        settled.cancel()
        if service.failure:
            server.should_exit = True
            await serving
            raise ConfigError(service.failure)
        ready = server.started and is_settled
        if ready:
            # Loaded models stay in memory. Exclude them from garbage collection: a walk over the
            # million objects of torch would interrupt a response.
            gc.collect()
            gc.freeze()
        return cls(service, ready, server, serving)

    def stop(self) -> None:
        """Refuse new connections, finish the requests that have arrived, then end."""
        self._server.handle_exit(signal.SIGTERM, None)

    async def wait(self) -> int:
        """Wait for the end; return the exit status: 0 after a signal, 1 without a start."""
        try:
            await self._serving
        finally:
            # The interpreter frees what is left at its end. Some extensions report objects that
            # are still frozen then as leaks.
            gc.unfreeze()
        return 0 if self._server.started else 1


async def serve(config: Config, out: Console, err: Console) -> int:
    """Serve until a signal arrives.

    Args:
        config: The configuration.
        out: Standard output.
        err: Standard error. If it is a terminal, a person reads it, else a program reads the log.

    Returns:
        The exit status: 0 after a signal, 1 if the server could not start.

    Raises:
        ConfigError: The models could not be loaded, or the port is in use.
    """
    logs.configure(config.server.log_level, config.secrets())
    start = monotonic()
    with show_progress(err) as progress:
        listener = listen(config)
        try:
            app = create_app(config, progress)
        except AlignError:
            listener.close()
            raise
        running = await RunningServer.start(app, listener)
    if running.ready:
        _reload_on_hangup(running.service)
        screen = err if err.is_terminal else out
        # A server serves on where nobody can read the screen: a full disk, or a closed pipe, which
        # rich turns into the end of the program.
        with suppress(OSError, SystemExit):
            print_welcome(running.service, server_url(listener), monotonic() - start, screen)
    return await running.wait()


@contextmanager
def show_progress(err: Console) -> Iterator[Callable[[str], None]]:
    """Provide a callback that shows or logs what is being loaded."""
    if not err.is_terminal:
        yield _log_progress
        return
    bar = Progress(
        SpinnerColumn(),
        TextColumn("loading {task.description}"),
        TimeElapsedColumn(),
        console=err,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None)

        def show(description: str) -> None:
            bar.update(task, description=description)

        yield show


def _log_progress(description: str) -> None:
    log.info("loading", extra={"part": description})


def _reload_on_hangup(service: Service) -> None:
    """Read the API keys and the configured values again on SIGHUP."""
    running: set[asyncio.Task[None]] = set()

    def reload() -> None:
        task = asyncio.create_task(service.reload())
        running.add(task)
        task.add_done_callback(running.discard)

    # Windows has no SIGHUP.
    if hasattr(signal, "SIGHUP"):
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return the constructor of the fastest event loop that is installed."""
    factory = uvicorn.Config(lambda: None).get_loop_factory()
    return factory or asyncio.new_event_loop


def listen(config: Config, *, shared: bool = False) -> socket.socket:
    """Return a socket that listens on the configured address.

    Args:
        config: The configuration.
        shared: Let further sockets of this user listen on the same address. Linux then spreads the
            connections over them.

    Raises:
        ConfigError: The address cannot be used.
    """
    host = config.server.host
    port = config.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only if the protocol is named. Without it every response waits
    # 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except (socket.gaierror, TypeError):
        listener.close()
        raise ConfigError(
            f"[server] host: {quote(host)} is no address and no name of one; must be an address of "
            "this machine, such as 127.0.0.1, or 0.0.0.0 for all of them."
        ) from None
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(
                f"[server] host: {quote(host)} is no address of this machine; use one, such as "
                "127.0.0.1, or 0.0.0.0 for all of them."
            ) from None
        raise ConfigError(
            f"[server] port: cannot listen on {host}:{port}: {error.strerror}; choose another "
            "port, or any free one with --set server.port=0."
        ) from None
    return listener


def _uvicorn_config(config: Config, app: FastAPI) -> uvicorn.Config:
    options: dict[str, Any] = {
        # Any client can send a proxy header. It must not choose the caller whose limits apply.
        "proxy_headers": False,
        "timeout_graceful_shutdown": max(1, round(config.server.drain_seconds)),
    }
    return uvicorn.Config(app, http=BoundedProtocol, log_config=None, access_log=False, **options)


def server_url(listener: socket.socket) -> str:
    """Return the URL of the server, without a path."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
