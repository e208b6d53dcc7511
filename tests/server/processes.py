"""The command `infer-align` as a process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

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


class Process:
    """A running `infer-align serve` and the lines of its standard error."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.popen = subprocess.Popen(
            [*COMMAND, "serve", *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**ENVIRONMENT, **environment},
            cwd=ROOT,
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()

    def line(self, pattern: str) -> re.Match[str]:
        """Wait for a line and return its match of a pattern."""
        matches: list[re.Match[str]] = []

        def is_there() -> bool:
            match = re.search(pattern, "".join(self.lines))
            if match:
                matches.append(match)
            return bool(match) or not self._reader.is_alive()

        with self._changed:
            while not self._changed.wait_for(is_there, timeout=1.0):
                assert self.popen.poll() is None, self.lines
        assert matches, self.lines
        return matches[0]

    def url(self) -> str:
        """Wait until the server is ready and return its URL."""
        return self.line(r"infer-align serves .* at (http://127\.0\.0\.1:\d+)").group(1)

    def wait(self) -> int:
        """Wait for the end of the process and return its exit status."""
        status = self.popen.wait(LIMIT_SECONDS)
        self._reader.join(LIMIT_SECONDS)
        assert self.popen.stderr is not None
        self.popen.stderr.close()
        return status
