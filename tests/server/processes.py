"""The command `infer-align` as a process.

Loading torch and transformers takes seconds of CPU time, and each command would pay for it again.
Commands therefore run in forks of one process that has loaded them: see `tests.server.preload`.
A fork has its own arguments, environment, outputs, signals and exit status. It skips the end of the
interpreter, and what Python reads when it starts; a test of these starts a new process.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(
        str(ROOT / part) for part in (".", "kernels", "server", "clients/python")
    ),
    # `tests.server.preload` sets these two as well: the command reads them when it is imported.
    "COLUMNS": "400",
    "NO_COLOR": "1",
    "PYTHONWARNINGS": "error",
}
COMMAND = [sys.executable, "-m", "infer_align_server"]
# Longer than any test takes, shorter than its timeout.
LIMIT_SECONDS = 100
# verify=False saves the set-up of TLS, which is slow and not used here.
LOCAL: Any = {"timeout": LIMIT_SECONDS, "trust_env": False, "verify": False}


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.server.preload"])
# What a fork runs, with its arguments.
Program = Callable[[list[str]], None]


class Forked:
    """A program in a fork. It has the methods of `subprocess.Popen` that tests need."""

    def __init__(
        self,
        program: Program,
        arguments: Sequence[str],
        environment: dict[str, str],
        output: int,
        errors: int,
    ) -> None:
        # A connection is what multiprocessing can hand over: it stands for its file descriptor.
        outputs = [Connection(os.dup(output)), Connection(os.dup(errors))]
        self._process = FORKS.Process(
            target=run_in_fork,
            args=(program, [*arguments], environment, *outputs),
            daemon=True,
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        for connection in outputs:
            connection.close()

    def poll(self) -> int | None:
        """Return the exit status, or None while the program runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Return the exit status when the program has ended."""
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired("infer-align", timeout)
        return status

    def send_signal(self, sign: int) -> None:
        """Send a signal to a program that runs."""
        if self.poll() is None:
            os.kill(self.pid, sign)

    def terminate(self) -> None:
        """Ask a program that runs to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill a program that runs."""
        self.send_signal(signal.SIGKILL)


def run_in_fork(
    program: Program,
    arguments: list[str],
    environment: dict[str, str],
    output: Connection,
    errors: Connection,
) -> None:
    """Run a program in this process, as if the process were new."""
    for number, connection in ((1, output), (2, errors)):
        os.dup2(connection.fileno(), number)
        connection.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    # A shell starts programs in the background with this signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.simplefilter(environment["PYTHONWARNINGS"])  # type: ignore[arg-type]
    program(arguments)


def command(arguments: list[str]) -> None:
    """Run `infer-align` and end the process with its exit status."""
    sys.exit(importlib.import_module("infer_align_server.cli").main(arguments))


def script(arguments: list[str]) -> None:
    """Run a file of Python code."""
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


class Finished(NamedTuple):
    """A program that has ended."""

    returncode: int
    stdout: str
    stderr: str


class Running:
    """A program whose outputs go to files, so that no pipe fills up. Use it in a `with` block."""

    def __init__(self, *arguments: str, program: Program = command, **environment: str) -> None:
        self._open = ExitStack()
        self._files: list[IO[str]] = []
        for _ in range(2):
            file = tempfile.TemporaryFile("w+")  # noqa: SIM115 - the stack closes it
            self._files.append(self._open.enter_context(file))
        output, errors = (file.fileno() for file in self._files)
        variables = {**ENVIRONMENT, **environment}
        self.popen = Forked(program, arguments, variables, output, errors)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        self.popen.wait(LIMIT_SECONDS)
        self._open.close()

    def finish(self) -> Finished:
        """Wait for the end of the program and return what it printed."""
        status = self.popen.wait(LIMIT_SECONDS)
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read())
        return Finished(status, *texts)


def run(*arguments: str, program: Program = command, **environment: str) -> Finished:
    """Run one command, or another program, to its end."""
    with Running(*arguments, program=program, **environment) as running:
        return running.finish()


class Lines:
    """The lines of one output of a process, read while it runs."""

    def __init__(self, popen: subprocess.Popen[str] | Forked, output: IO[str]) -> None:
        self.lines: list[str] = []
        self._popen = popen
        self._output = output
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self._output:
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()

    def find(self, pattern: str) -> re.Match[str]:
        """Wait for a line and return its match of a pattern."""
        matches: list[re.Match[str]] = []

        def is_there() -> bool:
            match = re.search(pattern, "".join(self.lines))
            if match:
                matches.append(match)
            return bool(match) or not self._reader.is_alive()

        with self._changed:
            while not self._changed.wait_for(is_there, timeout=1.0):
                assert self._popen.poll() is None, self.lines
        assert matches, self.lines
        return matches[0]

    def close(self) -> None:
        """Read to the end."""
        self._reader.join(LIMIT_SECONDS)
        self._output.close()


class Process:
    """A running `infer-align serve`, whose log and start screen are read.

    It is a fork, or with `fresh` a new process: its interpreter starts and ends as a user's does.
    """

    def __init__(self, *arguments: str, fresh: bool = False, **environment: str) -> None:
        screen, screen_end = os.pipe()
        log, log_end = os.pipe()
        serve = ["serve", *arguments]
        variables = {**ENVIRONMENT, **environment}
        self.popen: subprocess.Popen[str] | Forked
        if fresh:
            self.popen = subprocess.Popen(
                [*COMMAND, *serve],
                stdout=screen_end,
                stderr=log_end,
                text=True,
                env=variables,
                cwd=ROOT,
            )
        else:
            self.popen = Forked(command, serve, variables, screen_end, log_end)
        os.close(screen_end)
        os.close(log_end)
        self.log = Lines(self.popen, os.fdopen(log))
        self.screen = Lines(self.popen, os.fdopen(screen))

    def events(self) -> list[dict[str, Any]]:
        """Return the log so far: every line of standard error is a JSON object."""
        return [json.loads(line) for line in self.log.lines]

    def url(self) -> str:
        """Wait until the server is ready and return its URL."""
        return self.screen.find(r"infer-align serves .* at (http://127\.0\.0\.1:\d+)").group(1)

    def wait(self) -> int:
        """Wait for the end of the process and return its exit status."""
        status = self.popen.wait(LIMIT_SECONDS)
        self.log.close()
        self.screen.close()
        return status
