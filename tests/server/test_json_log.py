"""Without a terminal, standard error is a log: one JSON object a line, from start to end."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest

from tests.server.processes import COMMAND, ENVIRONMENT, LOCAL, ROOT, Process

pytestmark = pytest.mark.slow

CHAT = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 2}


def names_of(server: Process) -> list[str]:
    """Return the names of all events of the log."""
    return [event["event"] for event in server.events()]


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_every_line_from_start_to_end_is_json(
    command: Callable[..., Process], language_model: Callable[..., str], sign: int
) -> None:
    # Warnings are events of the log, so they must not end the process here. The interpreter prints
    # what is wrong at its end, and a fork skips that end, so one of the servers is no fork.
    server = command(
        language_model("Llama"), fresh=sign == signal.SIGTERM, PYTHONWARNINGS="default"
    )
    url = server.url()
    server.screen.find("docs +docs/api.md")
    screen = list(server.screen.lines)
    answer = httpx2.post(f"{url}/v1/chat/completions", json=CHAT, **LOCAL)
    assert answer.status_code == 200, answer.text
    assert httpx2.get(f"{url}/nowhere", **LOCAL).status_code == 404
    server.popen.send_signal(sign)
    assert server.wait() == {signal.SIGTERM: 0, signal.SIGINT: 130}[signal.Signals(sign)]
    assert server.screen.lines == screen
    names = names_of(server)
    assert names[0] == "loading"
    assert names.index("ready") < names.index("request") < names.index("drain started")
    assert names.count("request") == 2
    assert names[-1] == "drain ended"
    for event in server.events():
        assert {"time", "level", "logger", "event"} <= event.keys()


def test_unpacking_a_gguf_file_keeps_the_log_json(
    command: Callable[..., Process], gguf_model: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    # An empty cache, so that the file is unpacked.
    server = command(str(gguf_model()), XDG_CACHE_HOME=str(tmp_path), PYTHONWARNINGS="default")
    server.url()
    server.popen.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    parts = [event["part"] for event in server.events() if event["event"] == "loading"]
    assert any("unpacking" in part for part in parts)


class Terminal:
    """A pseudo-terminal whose output is read at once, so that no program waits to write."""

    def __init__(self) -> None:
        self._controller, self.file = pty.openpty()
        self._text = bytearray()
        self._marker = b"docs/api.md"
        self.has_screen = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        # The last program that closes the terminal ends the reading with an error.
        with suppress(OSError):
            while piece := os.read(self._controller, 4096):
                self._text += piece
                if self._marker in self._text:
                    self.has_screen.set()
        # A program that ends early must not be waited for.
        self.has_screen.set()

    def close(self) -> bytes:
        """Wait for the end of the output and return all of it."""
        self._reader.join()
        os.close(self._controller)
        return bytes(self._text)


def test_a_terminal_shows_the_start_screen_on_standard_error() -> None:
    terminal = Terminal()
    arguments = ["serve", "--port", "0", "--set", "engine.kind=fake"]
    server = subprocess.Popen(
        [*COMMAND, *arguments],
        stderr=terminal.file,
        stdout=subprocess.PIPE,
        env={**ENVIRONMENT, "TERM": "xterm"},
        cwd=ROOT,
    )
    os.close(terminal.file)
    terminal.has_screen.wait()
    server.terminate()
    output, _ = server.communicate()
    text = terminal.close()
    # Colours stand between the words.
    assert b" serves " in text
    assert b"loading engine fake" in text
    assert output == b""
