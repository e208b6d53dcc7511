"""Run the application under uvicorn: progress while it loads, a first request to try, a drain on SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
from collections.abc import Callable
from time import monotonic
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from infer_align.config.config import Config
from infer_align.errors import ConfigError
from infer_align_server import logs
from infer_align_server.app import create_app
from infer_align_server.service import Service
from infer_align_server.wire.protocol import BoundedProtocol

BACKLOG = 2048  # connections that may wait to be accepted


class DrainingServer(uvicorn.Server):  # type: ignore[misc]
    """Tells the service at the first signal, so that /ready turns while running requests finish."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT; a second SIGINT does not wait."""
        self._service.drain()
        super().handle_exit(sig, frame)
        # uvicorn raises what it captured again after the drain; ended as asked, the exit status of SIGTERM is 0.
        self._captured_signals: list[int] = [
            captured for captured in self._captured_signals if captured != signal.SIGTERM
        ]


async def serve(config: Config, console: Console) -> int:
    """Serve until a signal; 1 when the models could not be loaded or the port is taken."""
    logs.configure(config.server.log_level, config.secrets())
    with Progress(
        SpinnerColumn(),
        TextColumn("loading {task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("", total=None)
        started = monotonic()

        def progress(what: str) -> None:
            bar.update(task, description=what)
            if not console.is_terminal:  # in a container's log nothing is drawn over
                console.print(f"{monotonic() - started:6.1f} s  loading {what}", highlight=False)

        app = create_app(config, progress)
        service: Service = app.state.service
        server = DrainingServer(_uvicorn_config(config, app), service)
        listener = _listen(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        settled = asyncio.create_task(service.settled.wait())
        await asyncio.wait({serving, settled}, return_when=asyncio.FIRST_COMPLETED)
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
    if service.failure:
        server.should_exit = True
        await serving
        raise ConfigError(service.failure)
    if server.started and settled.done():
        # What is loaded stays: without it, the collector walks a million objects of torch's in the middle of an answer.
        gc.collect()
        gc.freeze()
        _reload_on_hangup(service)
        _welcome(listener, service, console)
    await serving
    settled.cancel()
    return 0 if server.started else 1


def _reload_on_hangup(service: Service) -> None:
    """SIGHUP, as daemons have it: what was fitted anew is read without a restart."""
    running: set[asyncio.Task[None]] = set()

    def reload() -> None:
        task = asyncio.create_task(service.reload_values())
        running.add(task)
        task.add_done_callback(running.discard)

    if hasattr(signal, "SIGHUP"):  # not on Windows
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """The fastest event loop that is installed."""
    factory = uvicorn.Config(lambda: None).get_loop_factory()
    return factory or asyncio.new_event_loop


def _listen(config: Config) -> socket.socket:
    host, port = config.server.host, config.server.port
    # The protocol is named because asyncio sets TCP_NODELAY only then: without it every answer waits 40 ms for an ACK.
    listener = socket.socket(
        socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP
    )
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = f"cannot listen on {host}:{port}: {error.strerror}"
        raise ConfigError(
            f"[server] port: {reason}; choose another with --set server.port=0."
        ) from None
    return listener


def _uvicorn_config(config: Config, app: FastAPI) -> uvicorn.Config:
    drain = max(1, round(config.server.drain_seconds))
    # A header that anybody can send must not choose whose limits count.
    options: dict[str, Any] = {"proxy_headers": False, "timeout_graceful_shutdown": drain}
    return uvicorn.Config(app, http=BoundedProtocol, log_config=None, access_log=False, **options)


def _welcome(listener: socket.socket, service: Service, console: Console) -> None:
    host, port = listener.getsockname()[:2]
    console.print(
        f"[bold]infer-align[/] serves [bold]{escape(service.model)}[/] at http://{host}:{port}/v1",
        highlight=False,
    )
    for name in service.models()[1:]:
        console.print(f"  preset [bold]{escape(name)}[/]", highlight=False)
