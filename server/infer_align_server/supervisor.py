"""Several worker processes on one address: start, watch, replace, reload and end them.

uvicorn's own supervisor does not fit. It ends the whole server if a replacement cannot start, its
workers outlive a killed supervisor, its health check does not reach the event loop, and all of its
workers share one socket, of which one worker may take every connection. Each worker here runs
uvicorn's server on a socket of its own. The supervisor holds these sockets too, so that connections
wait for the next worker while one is replaced.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic, time
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from infer_align.config.config import Config
from infer_align.errors import ConfigError
from infer_align_server import logs
from infer_align_server.forking import HANGUP, METHOD, SIGNALS, blocked_signals
from infer_align_server.serve import listen
from infer_align_server.sharing import Sharing
from infer_align_server.worker import Report, WorkerTask, run_worker

log = logging.getLogger("infer_align")

# Longest interval of pings in seconds, and their least number within the time of a hung worker.
PING_SECONDS = 5.0
PINGS = 4
# Time that a worker may take to end, beyond the drain, in seconds.
END_SECONDS = 10.0
# Waits before a worker that failed to start is started again, in seconds.
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 30.0


@dataclass(slots=True, eq=False)
class Worker:
    """A worker process, as its supervisor sees it.

    Attributes:
        slot: The index of its socket.
        process: The process.
        pipe: The supervisor's end of the pipe.
        ready: True once it serves.
        failure: The message with which it failed.
        is_pinged: True while a ping is not answered.
        missed: The number of intervals in which it did not answer. A pause of the whole machine
            counts as one.
        next_ping: The time of the next ping.
        kill_at: The time at which it is killed; None while it need not end.
    """

    slot: int
    process: BaseProcess
    pipe: Connection[Any, Any]
    ready: bool = False
    failure: str = ""
    is_pinged: bool = False
    missed: int = 0
    next_ping: float = field(default_factory=lambda: monotonic() + PING_SECONDS)
    kill_at: float | None = None

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self.process.pid or 0

    def end(self, seconds: float) -> None:
        """Ask the worker to finish its requests; kill it after so many seconds."""
        if self.kill_at is None:
            self.kill_at = monotonic() + seconds
            self.process.terminate()


class Supervisor:
    """The workers of one server.

    Args:
        config: The configuration.
        read_config: Reads the configuration again, on SIGHUP.
        width: The width of the start screen in columns.
    """

    def __init__(self, config: Config, read_config: Callable[[], Config], width: int) -> None:
        self._config = config
        self._read_config = read_config
        self._width = width
        self._start_time = int(time())
        self._context: Any = multiprocessing.get_context(METHOD)
        self._listeners: list[socket.socket] = []
        self._workers: list[Worker] = []
        # Workers with a new configuration, until all of them are ready.
        self._replacements: list[Worker] = []
        self._new_config: Config | None = None
        # {slot: when to start a worker in it}
        self._starts: dict[int, float] = {}
        self._failures = 0
        self._has_served = False
        self._signals: list[int] = []
        self._status: int | None = None

    def run(self) -> int:
        """Serve until a signal arrives; return the exit status.

        Raises:
            ConfigError: The address cannot be used, or no worker could start.
        """
        server = self._config.server
        logs.configure(server.log_level, self._config.secrets())
        with tempfile.TemporaryDirectory(prefix="infer-align-") as folder, self._woken() as wake:
            self._folder = Path(folder)
            self._sharing(self._config).make_files()
            self._open_listeners(self._config)
            # A collection in a worker would copy the memory of the objects that it looks at.
            gc.collect()
            gc.freeze()
            for slot in range(server.workers):
                self._workers.append(self._start(self._config, slot, is_first=slot == 0))
            try:
                while self._workers or self._starts:
                    self._step(wake)
            finally:
                self._close_listeners()
                for worker in [*self._workers, *self._replacements]:
                    worker.process.kill()
        return self._status or 0

    # --- the loop ---

    @contextmanager
    def _woken(self) -> Iterator[socket.socket]:
        """Collect signals, and yield a socket that is readable when there is one."""
        readable, writable = socket.socketpair()
        readable.settimeout(0)
        writable.settimeout(0)
        before = signal.set_wakeup_fd(writable.fileno())
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            signal.signal(number, lambda received, _: self._signals.append(received))
        try:
            self._wake_sockets = [readable, writable]
            yield readable
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)
            readable.close()
            writable.close()

    def _step(self, wake: socket.socket) -> None:
        """Wait for the next event and handle it."""
        workers = [*self._workers, *self._replacements]
        sources: list[Any] = [wake, *(worker.process.sentinel for worker in workers)]
        sources += [worker.pipe for worker in workers if not worker.pipe.closed]
        events = wait(sources, max(0.0, self._next_time() - monotonic()))
        if wake in events:
            wake.recv(4096)
        while self._signals:
            self._handle_signal(self._signals.pop(0))
        for worker in workers:
            if worker.pipe in events:
                self._read(worker)
            if worker.process.sentinel in events:
                self._bury(worker)
        self._act_in_time()

    def _next_time(self) -> float:
        times = [monotonic() + PING_SECONDS, *self._starts.values()]
        for worker in [*self._workers, *self._replacements]:
            times.append(worker.next_ping)
            if worker.kill_at is not None:
                times.append(worker.kill_at)
        return min(times)

    def _act_in_time(self) -> None:
        """Start, ping and kill the workers whose time has come."""
        now = monotonic()
        for slot in [slot for slot, start in self._starts.items() if start <= now]:
            del self._starts[slot]
            self._workers.append(self._start(self._config, slot))
        for worker in [*self._workers, *self._replacements]:
            if worker.kill_at is not None and worker.kill_at <= now:
                log.error("worker killed: it did not end in time", extra={"worker": worker.pid})
                worker.process.kill()
                worker.kill_at = now + END_SECONDS
            if worker.next_ping <= now:
                self._ping(worker, now)

    def _ping(self, worker: Worker, now: float) -> None:
        """Ping a worker, or kill it if its event loop has not answered for too long.

        A worker that still loads is not pinged: nothing bounds the time of loading.
        """
        timeout = self._config.server.worker_timeout_seconds
        interval = min(PING_SECONDS, timeout / PINGS)
        worker.next_ping = now + interval
        if not worker.ready or worker.kill_at is not None or worker.pipe.closed:
            return
        if not worker.is_pinged:
            worker.is_pinged = True
            try:
                worker.pipe.send("ping")
            except OSError:
                # It has just ended.
                worker.pipe.close()
            return
        worker.missed += 1
        if worker.missed * interval >= timeout:
            details = {"worker": worker.pid, "seconds": timeout}
            log.error("worker killed: it does not answer", extra=details)
            worker.process.kill()

    # --- the workers ---

    def _sharing(self, config: Config) -> Sharing:
        return Sharing(self._folder, config.server.workers, self._start_time)

    def _start(self, config: Config, slot: int, *, is_first: bool = False) -> Worker:
        pipe, worker_pipe = self._context.Pipe()
        task = WorkerTask(config, self._sharing(config), is_first, self._width)
        listener = self._listeners[slot]
        inherited: list[socket.socket | Connection[Any, Any]] = []
        if METHOD == "fork":
            inherited += [pipe, *self._wake_sockets]
            inherited += [each for each in self._listeners if each is not listener]
            inherited += [each.pipe for each in [*self._workers, *self._replacements]]
        process = self._context.Process(
            target=run_worker,
            args=(task, listener, worker_pipe, inherited),
            name=f"worker {slot}",
        )
        with blocked_signals():
            process.start()
        worker_pipe.close()
        log.info("worker started", extra={"worker": process.pid})
        return Worker(slot, process, pipe)

    def _read(self, worker: Worker) -> None:
        """Read the reports of a worker."""
        try:
            while worker.pipe.poll():
                self._note(worker, worker.pipe.recv())
        except (EOFError, OSError):
            worker.pipe.close()

    def _note(self, worker: Worker, report: Report) -> None:
        if report.kind == "failed":
            worker.failure = report.message
            return
        worker.is_pinged = False
        worker.missed = 0
        if report.kind == "ready":
            worker.ready = True
            self._has_served = True
            self._failures = 0
            self._finish_reload()

    def _bury(self, worker: Worker) -> None:
        """Handle the end of a worker."""
        self._read(worker)
        worker.process.join()
        worker.pipe.close()
        mark_process_dead(worker.pid, str(self._folder))
        status = worker.process.exitcode
        if worker in self._replacements:
            self._abort_reload(worker.failure or f"a worker ended with status {status}")
            return
        if worker not in self._workers:
            # A replacement that was given up.
            return
        self._workers.remove(worker)
        if worker.kill_at is not None or self._status is not None:
            log.info("worker ended", extra={"worker": worker.pid})
            return
        reason = worker.failure or f"exit status {status}"
        if not self._has_served:
            raise ConfigError(worker.failure or f"a worker could not start: {reason}.")
        log.error("worker lost: %s", reason, extra={"worker": worker.pid})
        self._starts[worker.slot] = monotonic() + self._wait_seconds(worker)

    def _wait_seconds(self, worker: Worker) -> float:
        """Return the time until a lost worker is replaced: at once if it has served."""
        if worker.ready:
            return 0.0
        self._failures += 1
        return min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** (self._failures - 1))

    # --- sockets ---

    def _open_listeners(self, config: Config) -> None:
        """Open one socket per worker; where the system cannot balance them, one for all."""
        balanced = sys.platform == "linux"
        while len(self._listeners) < config.server.workers:
            if not self._listeners:
                # Without sharing, so that a port of another server counts as used.
                listen(config).close()
                self._listeners.append(listen(config, shared=balanced))
            elif balanced:
                port = self._listeners[0].getsockname()[1]
                server = replace(self._config.server, port=port)
                self._listeners.append(listen(replace(config, server=server), shared=True))
            else:
                self._listeners.append(self._listeners[0].dup())

    def _close_listeners(self, first: int = 0) -> None:
        for listener in self._listeners[first:]:
            listener.close()
        del self._listeners[first:]

    # --- signals ---

    def _handle_signal(self, number: int) -> None:
        if number == HANGUP:
            self._reload()
            return
        if self._status is not None and number == signal.SIGINT:
            for worker in [*self._workers, *self._replacements]:
                worker.process.kill()
            return
        log.info("stop", extra={"signal": signal.Signals(number).name})
        self._status = 130 if number == signal.SIGINT else 0
        self._new_config = None
        self._starts.clear()
        self._workers += self._replacements
        self._replacements = []
        self._close_listeners()
        for worker in self._workers:
            worker.end(self._config.server.drain_seconds + END_SECONDS)

    def _reload(self) -> None:
        """Read the configuration, and start workers that use it beside those that run."""
        if self._status is not None:
            return
        try:
            config = self._read_config()
        except ConfigError as error:
            log.error("the configuration stays as it was: %s", error.message)
            return
        if (config.server.host, config.server.port) != self._address:
            log.warning("[server] host and port stay as they were until the next start")
        if self._replacements:
            self._abort_reload("it was read again")
        self._new_config = config
        self._open_listeners(config)
        for slot in range(config.server.workers):
            self._replacements.append(self._start(config, slot))

    @property
    def _address(self) -> tuple[str, int]:
        return self._config.server.host, self._config.server.port

    def _abort_reload(self, reason: str) -> None:
        log.error("the configuration stays as it was: %s", reason)
        self._new_config = None
        for worker in self._replacements:
            worker.process.kill()
            # Its end is no loss.
            worker.kill_at = monotonic() + END_SECONDS
        self._workers += [each for each in self._replacements if each.process.is_alive()]
        self._replacements = []

    def _finish_reload(self) -> None:
        """Let the old workers end once all new ones serve."""
        if self._new_config is None or not all(each.ready for each in self._replacements):
            return
        for worker in self._workers:
            worker.end(self._config.server.drain_seconds + END_SECONDS)
        self._config, self._new_config = self._new_config, None
        self._workers += self._replacements
        self._replacements = []
        self._starts.clear()
        self._close_listeners(self._config.server.workers)
        log.info("configuration: read again", extra={"workers": self._config.server.workers})
