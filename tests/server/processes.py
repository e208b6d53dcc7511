"""The command `infer-align` as a process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(
        str(ROOT / part) for part in (".", "kernels", "server", "clients/python")
    ),
    "COLUMNS": "200",
    "NO_COLOR": "1",
    "PYTHONWARNINGS": "error",
}
COMMAND = [sys.executable, "-m", "infer_align_server"]
# Longer than any test takes, shorter than its timeout.
LIMIT_SECONDS = 100
LOCAL: Any = {"timeout": LIMIT_SECONDS, "trust_env": False}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        env={**ENVIRONMENT, **environment},
        cwd=ROOT,
        check=False,
    )


class Lines:
    """The lines of one output of a process, read while it runs."""

    def __init__(self, popen: subprocess.Popen[str], output: IO[str]) -> None:
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
    """A running `infer-align serve`, whose log and start screen are read."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.popen = subprocess.Popen(
            [*COMMAND, "serve", *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, **environment},
            cwd=ROOT,
        )
        assert self.popen.stderr is not None
        assert self.popen.stdout is not None
        self.log = Lines(self.popen, self.popen.stderr)
        self.screen = Lines(self.popen, self.popen.stdout)

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
