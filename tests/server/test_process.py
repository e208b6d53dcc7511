"""The command as a process: it serves, drains, ends with a status, and says clearly what is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from infer_align_server import cli

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
SLOW = '[engine]\nkind = "fake"\nreplies = [{text = "1 2 3 4 5 6 7 8", seconds_per_token = 0.2}]\n'


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """One command, to its end."""
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env={**ENVIRONMENT, **environment},
        cwd=ROOT,
        check=False,
    )


class Process:
    """A running `infer-align serve`, with what it has said."""

    def __init__(self, *arguments: str) -> None:
        self.popen = subprocess.Popen(
            [*COMMAND, "serve", *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            cwd=ROOT,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        self.lines.extend(self.popen.stderr)

    def url(self) -> str:
        """Where it says that it serves."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            self.lines_now = list(self._said())
            if found := re.search(r"http://127\.0\.0\.1:\d+", "".join(self.lines_now)):
                return found.group()
            assert self.popen.poll() is None, self.lines
            time.sleep(0.02)
        raise AssertionError(self.lines)

    def _said(self) -> Iterator[str]:
        yield from self.lines

    def wait(self) -> int:
        code = self.popen.wait(20)
        self._reader.join(5)
        for pipe in (self.popen.stderr, self.popen.stdout):
            assert pipe is not None
            pipe.close()
        return code


@pytest.fixture
def process(config_file: Callable[[str], Path]) -> Iterator[Callable[..., Process]]:
    """`process(toml, "--set", ...)`: `infer-align serve` on a free port."""
    started: list[Process] = []

    def spawn(text: str, *arguments: str) -> Process:
        started.append(Process(str(config_file(text)), "--set", "server.port=0", *arguments))
        return started[-1]

    yield spawn
    for one in started:
        if one.popen.poll() is None:
            one.popen.kill()
        one.wait()


@pytest.mark.parametrize("stream", [False, True])
def test_sigterm_lets_what_runs_finish_and_refuses_what_is_new(process: Any, stream: bool) -> None:
    server = process(SLOW)
    url = server.url()
    body = {"messages": [{"role": "user", "content": "x"}], "stream": stream}
    answers: list[httpx2.Response] = []

    def ask() -> None:
        answers.append(
            httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=20, trust_env=False)
        )

    with httpx2.Client(base_url=url, trust_env=False) as kept:
        asking = threading.Thread(target=ask)
        asking.start()
        while "infer_align_running_requests 1.0" not in kept.get("/metrics").text:
            time.sleep(0.01)
        server.popen.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(httpx2.TransportError):
            httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=5, trust_env=False)
        asking.join()
    assert answers[0].status_code == 200
    if stream:
        assert answers[0].text.endswith("data: [DONE]\n\n")
        assert '" 8"' in answers[0].text
    else:
        assert answers[0].json()["choices"][0]["message"]["content"] == "1 2 3 4 5 6 7 8"
    assert server.wait() == 0
    for line in server.lines:
        if line.startswith("{"):
            event = json.loads(line)
            assert event["level"] == "info", event
    requests = [json.loads(line) for line in server.lines if '"event": "request"' in line]
    assert requests[-1]["route"] == "/v1/chat/completions"
    assert len(requests[-1]["request_id"]) == 32


@pytest.mark.slow
def test_what_does_not_finish_in_time_is_cut(process: Any) -> None:
    server = process(
        '[server]\ndrain_seconds = 1\n[engine]\nkind = "fake"\nreplies = [{text = "1 2", first_token_seconds = 60}]\n'
    )
    url = server.url()
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as raw:
        content = b'{"messages": [{"role": "user", "content": "x"}]}'
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
            % (len(content), content)
        )
        while (
            "infer_align_running_requests 1.0"
            not in httpx2.get(f"{url}/metrics", trust_env=False).text
        ):
            time.sleep(0.01)
        server.popen.send_signal(signal.SIGTERM)
        assert server.wait() == 0


@pytest.mark.slow
def test_sigterm_while_loading(process: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = process('[engine]\nkind = "fake"\nload_seconds = 60\n', "--set", f"server.port={port}")
    while server.popen.poll() is None:
        with suppress(httpx2.TransportError):
            assert httpx2.get(f"http://127.0.0.1:{port}/ready", trust_env=False).status_code == 503
            break
        time.sleep(0.05)
    server.popen.send_signal(signal.SIGTERM)
    assert server.wait() == 0


@pytest.mark.slow
def test_values_are_read_again_on_sighup(process: Any, tmp_path: Path) -> None:
    head = tmp_path / "value.safetensors"
    shutil.copy(ROOT / "infer_align/demo/assets/value-helpful.safetensors", head)
    server = process(
        f'[engine]\nkind = "transformers"\nmodel = "demo"\nthreads = 1\n[values.v]\nkind = "head"\npath = "{head}"\n'
    )
    url = f"{server.url()}/v1/chat/completions"
    body = {
        "messages": [{"role": "user", "content": "What is the diet of the owl?"}],
        "temperature": 0,
        "max_tokens": 40,
    }

    def said() -> str:
        answer = httpx2.post(
            url, json={**body, "align": {"vas": {"beta": {"v": 30.0}}}}, trust_env=False, timeout=30
        )
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    def told(words: str) -> None:
        end = time.monotonic() + 10
        while not any(words in line for line in [*server.lines]):
            assert time.monotonic() < end, server.lines
            time.sleep(0.02)

    before = said()
    head.write_bytes(b"not a head")
    server.popen.send_signal(signal.SIGHUP)
    told("value v stays as it was")
    assert said() == before, "a file that cannot be read changes nothing"
    shutil.copy(ROOT / "infer_align/demo/assets/value-brief.safetensors", head)
    server.popen.send_signal(signal.SIGHUP)
    told("value v: read again")
    assert said() != before
    server.popen.send_signal(signal.SIGTERM)
    assert server.wait() == 0


def test_port_taken(config_file: Callable[[str], Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(
            "serve", str(config_file('[engine]\nkind = "fake"\n')), "--set", f"server.port={port}"
        )
    assert done.returncode == 2
    assert (
        f"[server] port: cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr
    )
    assert "--set server.port=0" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_load_that_fails_ends_the_process(
    config_file: Callable[[str], Path], tmp_path: Path
) -> None:
    text = f'[rewards.gone]\nkind = "classifier"\nmodels = ["{tmp_path}/none"]\n[engine]\nkind = "fake"\n'
    done = run("serve", str(config_file(text)), "--set", "server.port=0")
    assert done.returncode == 2
    assert f"{tmp_path}/none" in done.stderr
    assert "Traceback" not in done.stderr


WRONG = [
    (
        '[engine]\nkind = "fake"\n[limit]\nmax_queue = 1\n',
        "[limit]: no such section; did you mean 'limits'?",
    ),
    (
        '[engine]\nkind = "fake"\n[limits]\nmax_que = 1\n',
        "limits.max_que: no such parameter; did you mean 'max_queue'?",
    ),
    ('[engine]\nkind = "fak"\n', "engine.kind: 'fak' is not one of them; did you mean 'fake'?"),
    (
        '[engine]\nkind = "fake"\n[server]\nlog_level = "loud"\n',
        "server.log_level: 'loud' is not allowed",
    ),
    ('[engine]\nkind = "fake"\n[rewards.a]\nwords_weight = 1\n', "[rewards.a] needs a kind"),
    (
        '[engine]\nkind = "fake"\n[presets.a]\nbest_of = {}\n',
        "[presets.a] align.best_of: no such key",
    ),
    ("[engine\n", "not TOML"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_wrong_configuration(
    config_file: Callable[[str], Path], capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    assert cli.main(["config", "show", str(config_file(text))]) == 2
    assert message in " ".join(capsys.readouterr().err.split()), (
        "brackets are text here, not markup"
    )


@pytest.mark.parametrize(
    "setting",
    ["server.port", "=5", "server..port=1", "engine=fake", "server.port.x=1", "server.port=many"],
)
def test_a_wrong_override(
    config_file: Callable[[str], Path], capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    path = config_file('[engine]\nkind = "fake"\n[server]\nport = 1\n')
    assert cli.main(["config", "show", str(path), "--set", setting]) == 2
    assert capsys.readouterr().err.startswith("configuration:")


def test_config_show_says_where_each_value_is_from(config_file: Callable[[str], Path]) -> None:
    path = config_file(
        '[engine]\nkind = "fake"\n[server]\nport = 9\n[rewards.r]\nkind = "rules"\nregex = "[a-z]+[/x]"\n'
        "[presets.p]\nbest_of_n = {n = 2}\n"
    )
    done = run("config", "show", str(path), "--set", "limits.max_queue=7", COLUMNS="400")
    assert done.returncode == 0, done.stderr
    rows = {
        cells[0]: cells[1:]
        for line in done.stdout.splitlines()
        if len(cells := [c.strip() for c in line.split("│")[1:-1]]) == 3
    }
    assert rows["limits.max_queue"] == ["7", "--set"]
    assert rows["server.port"] == ["9", str(path)]
    assert rows["server.host"] == ["'127.0.0.1'", "default"]
    assert rows["rewards.r.regex"] == ["'[a-z]+[/x]'", str(path)]
    assert rows["presets.p"][1] == str(path)


@pytest.mark.slow
def test_methods() -> None:
    done = run("methods")
    assert done.returncode == 0, done.stderr
    for word in (
        "best_of_n",
        "n=8",
        "ensemble",
        "uncertainty_weight=0.5",
        "budget",
        "rules",
        "callable",
        "fake",
        "transformers",
    ):
        assert word in done.stdout
    assert "[rewards.<name>] kind" in done.stdout


def test_chat_one_shot(numbers: Any) -> None:
    done = run(
        "chat", "hello", "--base-url", numbers.base_url, "--align", '{"best_of_n": {"n": 5}}'
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("candidate 9\n")
    assert "runner-up" in done.stdout
    assert "number" in done.stdout
    plain = run("chat", "hello", "--base-url", numbers.base_url, "--system", "be brief")
    assert plain.stdout == "candidate 3\n"
    assert numbers.engine.bodies[-1]["messages"][0] == {"role": "system", "content": "be brief"}


def test_chat_says_what_is_wrong(numbers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "hello", "--base-url", "http://127.0.0.1:9/v1"]) == 1
    assert "is the server running?" in " ".join(capsys.readouterr().err.split())
    for options in (
        ["--align", '{"best_of": {}}'],
        ["--model", "nope"],
        ["--base-url", "http://[bad"],
        ["--base-url", numbers.root],
    ):
        assert cli.main(["chat", "hello", "--base-url", numbers.base_url, *options]) == 1, options
        assert "error:" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["chat", "hello", "--align", "[1]"])


@pytest.mark.slow
def test_chat_as_a_conversation(numbers: Any) -> None:
    done = subprocess.run(
        [*COMMAND, "chat", "--base-url", numbers.base_url],
        input="first\n\nsecond\n",
        capture_output=True,
        text=True,
        timeout=30,
        env=ENVIRONMENT,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("candidate 3") == 2
    roles = [message["role"] for message in numbers.engine.bodies[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]
