"""An HTTP server in a thread of the test process, on a free port."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import uvicorn

# The longest time to wait for the start or the end, shorter than the timeout of one test.
LIMIT_SECONDS = 100
T = TypeVar("T")


class ThreadedServer(uvicorn.Server):
    """A server that is up when it is made, and that ends at once.

    uvicorn looks ten times a second whether it should end, and then waits for 0.1 s. Hundreds of
    tests end a server, and would wait with it.
    """

    def __init__(self, app: Any, **options: Any) -> None:
        """Serve an ASGI app; the options are those of `uvicorn.Config`."""
        fields: Any = {"port": 0, "log_config": None, "access_log": False, **options}
        super().__init__(uvicorn.Config(app, **fields))
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._is_up.wait(LIMIT_SECONDS)
        assert self.started, "the server did not start"
        self.port: int = self.servers[0].sockets[0].getsockname()[1]

    def tasks(self) -> set[asyncio.Task[Any]]:
        """Return the tasks that have not ended."""
        return asyncio.all_tasks(self._loop)

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin some work in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def begin_end(self) -> None:
        """Make the server end soon."""
        self.should_exit = True
        # A loop that is closed already belongs to a server that has ended.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._is_ending.set)

    def end(self) -> None:
        """End the server and wait for its end."""
        self.begin_end()
        self._thread.join(LIMIT_SECONDS)
        assert not self._thread.is_alive(), "the server did not end"

    def _run(self) -> None:
        try:
            self.run()
        finally:
            self._is_up.set()

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_ending = asyncio.Event()
        await super().startup(sockets)
        self._is_up.set()

    async def main_loop(self) -> None:
        # One tick writes the headers that every answer has.
        await self.on_tick(0)
        await self._is_ending.wait()

    async def shutdown(self, sockets: Any = None) -> None:
        for listener in self.servers:
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.config.timeout_graceful_shutdown):
                while self.server_state.connections or self.server_state.tasks:
                    await asyncio.sleep(0.001)
        for task in list(self.server_state.tasks):
            task.cancel()
        await self.lifespan.shutdown()
