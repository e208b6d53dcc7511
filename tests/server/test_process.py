"""The command `infer-align` as a process: serving, draining, exit status and error messages."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from infer_align_server import cli
from tests.server.processes import COMMAND, ENVIRONMENT, LIMIT_SECONDS, LOCAL, ROOT, run

pytestmark = pytest.mark.slow


def wait_for_running_request(url: str) -> None:
    while "infer_align_running_requests 1.0" not in httpx2.get(f"{url}/metrics", **LOCAL).text:
        time.sleep(0.01)


def wait_for_refusal(url: str) -> None:
    """Wait until the server accepts no connections."""
    while True:
        try:
            httpx2.get(f"{url}/health", **LOCAL)
        except httpx2.TransportError:
            return
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_sigterm_finishes_running_requests_and_refuses_new_ones(
    process: Any, tmp_path: Path, stream: bool
) -> None:
    hold_file = tmp_path / "go"
    server = process(
        '[engine]\nkind = "fake"\nreplies = [{text = "1 2 3 4 5 6 7 8"}]\n'
        '[rewards.held]\nkind = "callable"\nfunction = "tests.server.scorers:held_by_a_file"\n',
        TEST_HOLD_FILE=str(hold_file),
    )
    url = server.url()
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "stream": stream,
        "align": {"best_of_n": {"n": 2}},
    }
    answers: list[httpx2.Response] = []

    def send() -> None:
        answers.append(httpx2.post(f"{url}/v1/chat/completions", json=body, **LOCAL))

    sender = threading.Thread(target=send)
    sender.start()
    wait_for_running_request(url)
    server.popen.send_signal(signal.SIGTERM)
    wait_for_refusal(url)
    with pytest.raises(httpx2.TransportError):
        httpx2.post(f"{url}/v1/chat/completions", json=body, **LOCAL)
    assert not answers, "the first request is still running"
    hold_file.touch()
    sender.join()
    assert answers[0].status_code == 200
    if stream:
        assert answers[0].text.endswith("data: [DONE]\n\n")
        assert '"1 2 3 4 5 6 7 8"' in answers[0].text
    else:
        assert answers[0].json()["choices"][0]["message"]["content"] == "1 2 3 4 5 6 7 8"
    assert server.wait() == 0
    events = server.events()
    for event in events:
        assert event["level"] == "info", event
    requests = [event for event in events if event["event"] == "request"]
    assert requests[-1]["route"] == "/v1/chat/completions"
    assert len(requests[-1]["request_id"]) == 32


@pytest.mark.slow
def test_a_request_that_outlasts_the_drain_gets_an_error_that_says_so(process: Any) -> None:
    server = process(
        "[server]\ndrain_seconds = 1\n"
        '[engine]\nkind = "fake"\nreplies = [{text = "1 2", first_token_seconds = 3600}]\n'
    )
    url = server.url()
    port = int(url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT_SECONDS) as raw:
        content = b'{"messages": [{"role": "user", "content": "x"}]}'
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
            % (len(content), content)
        )
        wait_for_running_request(url)
        server.popen.send_signal(signal.SIGTERM)
        answer = raw.makefile("rb").read().decode()
    assert answer.startswith("HTTP/1.1 503 "), answer
    assert "\r\nretry-after: 1\r\n" in answer
    error = json.loads(answer.partition("\r\n\r\n")[2])["error"]
    assert error["code"] == "unavailable"
    assert "[server] drain_seconds; send the request again" in error["message"]
    assert server.wait() == 0
    events = server.events()
    assert not any("exception" in event for event in events), events
    (request,) = (event for event in events if event.get("route") == "/v1/chat/completions")
    assert request["status"] == 503


@pytest.mark.slow
def test_a_stream_that_outlasts_the_drain_ends_without_a_traceback(process: Any) -> None:
    server = process(
        "[server]\ndrain_seconds = 1\nkeepalive_seconds = 0.05\n"
        '[engine]\nkind = "fake"\nreplies = [{text = "1 2", first_token_seconds = 3600}]\n'
    )
    url = server.url()
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, **LOCAL) as response:
        assert response.status_code == 200
        server.popen.send_signal(signal.SIGTERM)
        with pytest.raises(httpx2.TransportError):
            response.read()
    assert server.wait() == 0
    events = server.events()
    assert not any("exception" in event for event in events), events
    assert "cut off: the drain has ended" in {event["event"] for event in events}


@pytest.mark.slow
def test_sigterm_while_loading_ends_the_process(process: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    server = process(
        '[engine]\nkind = "fake"\nload_seconds = 3600\n', "--set", f"server.port={port}"
    )
    while server.popen.poll() is None:
        with suppress(httpx2.TransportError):
            answer = httpx2.get(f"http://127.0.0.1:{port}/ready", **LOCAL)
            assert answer.status_code == 503
            break
        time.sleep(0.05)
    server.popen.send_signal(signal.SIGTERM)
    assert server.wait() == 0


@pytest.mark.slow
def test_sighup_reads_the_values_again(process: Any, tmp_path: Path) -> None:
    assets = ROOT / "infer_align/demo/assets"
    head = tmp_path / "value.safetensors"
    shutil.copy(assets / "value-helpful.safetensors", head)
    server = process(
        '[engine]\nkind = "transformers"\nmodel = "demo"\nthreads = 1\n'
        f'[values.v]\nkind = "head"\npath = "{head}"\n'
    )
    url = f"{server.url()}/v1/chat/completions"
    body = {
        "messages": [{"role": "user", "content": "What is the diet of the owl?"}],
        "temperature": 0,
        "max_tokens": 40,
        "align": {"vas": {"beta": {"v": 30.0}}},
    }

    def completion() -> str:
        answer = httpx2.post(url, json=body, **LOCAL)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    before = completion()
    head.write_bytes(b"not a head")
    server.popen.send_signal(signal.SIGHUP)
    server.log.find("value v stays as it was")
    assert completion() == before, "a file that cannot be read changes nothing"
    shutil.copy(assets / "value-brief.safetensors", head)
    server.popen.send_signal(signal.SIGHUP)
    server.log.find("value v: read again")
    assert completion() != before
    server.popen.send_signal(signal.SIGTERM)
    assert server.wait() == 0


def test_a_used_port_is_named(config_file: Callable[[str], Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
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
    reward = f'[rewards.gone]\nkind = "classifier"\nmodels = ["{tmp_path}/none"]\n'
    text = f'{reward}[engine]\nkind = "fake"\n'
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
    ('[engine]\nkind = "fak"\n', "engine.kind: 'fak' is not a known kind; did you mean 'fake'?"),
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
def test_a_wrong_configuration_is_named(
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
def test_a_wrong_override_is_named(
    config_file: Callable[[str], Path], capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    path = config_file('[engine]\nkind = "fake"\n[server]\nport = 1\n')
    assert cli.main(["config", "show", str(path), "--set", setting]) == 2
    assert capsys.readouterr().err.startswith("configuration:")


def test_config_show_gives_the_origin_of_each_value(config_file: Callable[[str], Path]) -> None:
    path = config_file(
        '[engine]\nkind = "fake"\n[server]\nport = 9\n'
        '[rewards.r]\nkind = "rules"\nregex = "[a-z]+[/x]"\n'
        "[presets.p]\nbest_of_n = {n = 2}\n"
    )
    done = run("config", "show", str(path), "--set", "limits.max_queue=7")
    assert done.returncode == 0, done.stderr
    rows = {}
    for line in done.stdout.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if len(cells) == 3:
            rows[cells[0]] = cells[1:]
    assert rows["limits.max_queue"] == ["7", "--set"]
    assert rows["server.port"] == ["9", str(path)]
    assert rows["server.host"] == ["'127.0.0.1'", "default"]
    assert rows["rewards.r.regex"] == ["'[a-z]+[/x]'", str(path)]
    assert rows["presets.p"][1] == str(path)


@pytest.mark.slow
def test_methods_lists_plugins_and_parameters() -> None:
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


def test_chat_sends_one_message(numbers: Any) -> None:
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


def test_chat_sends_the_sampling_fields(numbers: Any) -> None:
    fields = ("--temperature", "0.5", "--top-p", "0.9", "--max-tokens", "6")
    done = run("chat", "hello", "--base-url", numbers.base_url, *fields)
    assert done.returncode == 0, done.stderr
    body = numbers.engine.bodies[-1]
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.5, 0.9, 6)


def test_chat_reports_errors(numbers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "hello", "--base-url", "http://127.0.0.1:9/v1"]) == 1
    assert "is the server running?" in " ".join(capsys.readouterr().err.split())
    for options in (
        ["--align", '{"best_of": {}}'],
        ["--model", "nope"],
        ["--base-url", numbers.root],
    ):
        assert cli.main(["chat", "hello", "--base-url", numbers.base_url, *options]) == 1, options
        assert "error:" in capsys.readouterr().err
    for options in (["--align", "[1]"], ["--base-url", "http://[bad"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["chat", "hello", *options])


@pytest.mark.slow
def test_chat_keeps_the_conversation(numbers: Any) -> None:
    done = subprocess.run(
        [*COMMAND, "chat", "--base-url", numbers.base_url],
        input="first\n\nsecond\n",
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        env=ENVIRONMENT,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("candidate 3") == 2
    roles = [message["role"] for message in numbers.engine.bodies[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]
