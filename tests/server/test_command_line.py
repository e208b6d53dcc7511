"""Commands with arguments that nothing can be made of, and with closed or full outputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infer_align_server import cli
from tests.threaded_server import ThreadedServer

DEEP = "[" * 60_000
DIGITS = "9" * 5000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "--port", DIGITS], "must be an integer from 0 to 65535"),
        (["serve", "--port", "-1"], "'-1' is not allowed; must be an integer from 0 to 65535"),
        (["serve", "--port", "\u0661\u0662"], "must be an integer from 0 to 65535"),
        (["serve", "--port", "65536"], "'65536' is not allowed"),
        (["chat", "hi", "--align", DEEP], "is nested too deeply"),
        (["chat", "hi", "--align", '{"a": NaN}'], "NaN is not a JSON number"),
        (["chat", "hi", "--align", '{"a": 1e999}'], "'1e999' is too large for a float"),
        (["chat", "hi", "--align", "x" * 9999], "is not JSON"),
        (["chat", "hi", "--temperature", "nan"], "must be a number of at least 0"),
        (["chat", "hi", "--top-p", "0"], "must be a number above 0"),
        (["chat", "hi", "--max-tokens", "0"], "must be a whole number of at least 1"),
        (["chat", "hi", "--max-tokens", DIGITS], "must be a whole number of at least 1"),
        (["chat", "hi", "--base-url", "http://[::1"], "'http://[::1' is not an http(s) URL"),
        (["chat", "hi", "--base-url", ""], "is not an http(s) URL"),
        (["bench", "serve", "--base-url", "http://a b"], "'http://a b' is not an http(s) URL"),
        (["bench", "serve", "--against", "ftp://a"], "'ftp://a' is not an http(s) URL"),
        (["bench", "serve", "--body", DEEP], "is nested too deeply"),
        (["bench", "serve", "--requests", DIGITS], "must be a whole number of at least 1"),
        (["bench", "serve", "--input-tokens", "1-"], "'' is not allowed; must be a whole number"),
        (["bench", "plan", "--spread", "1e300"], "must be a number from 0.001 to 100"),
        (["bench", "plan", "--spread", "1e-300"], "must be a number from 0.001 to 100"),
        (["check", "dpa", "--max-tokens", "-1"], "must be an integer of at least 1"),
        (["rewards", "check", "--limit", DIGITS], "must be an integer of at least 1"),
        (["fit", "reward", "--members", DIGITS], "must be an integer of at least 1"),
        (["fit", "reward", "--seed", DIGITS], "must be an integer from 0 to 4294967295"),
    ],
)
def test_a_wrong_value_of_an_option(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert message in error
    assert len(error) < 400


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["keys", "new", "\udce4"], "the argument '\\udce4' is not UTF-8"),
        (["serve", "--set", "engine.kind=fake", "--host", ""], "server.host: '' is not allowed"),
        (["serve", "--set", "engine.kind=fake", "--name", ""], "server.served_name: ''"),
        (["serve", "--set", "engine.kind=fake", "--host", "\u00fc" * 80], "[server] host: "),
        (["serve", "--set", "engine.kind=fake", "--host", "a b"], "no address and no name of one"),
        (["serve", "--set", "engine.kind=fake", "--host", "192.0.2.1"], "of this machine; use one"),
        (
            ["serve", "--port", "0", "--upstream", "http://a b"],
            "[engine] urls: 'http://a b' is not an http(s)",
        ),
    ],
)
def test_a_wrong_value_of_a_setting(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("configuration: ")
    assert message in lines[-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "prompts: prompts.jsonl cannot be read: No such file or directory."),
        ('"a"\n{oops\n', "prompts: prompts.jsonl:2 is neither"),
        ('"a"\n' + DEEP, "prompts: prompts.jsonl:2 is neither"),
    ],
)
def test_a_wrong_file_of_prompts_is_named(
    content: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("prompts.jsonl").write_text(content)
    files = ["--prompts", "prompts.jsonl", "--out", "out.safetensors"]
    assert cli.main(["fit", "value", "--reward", "quality", *files]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "rescore: samples.jsonl cannot be read: No such file or directory."),
        ("", "rescore: samples.jsonl has no header."),
        ("{oops\n", "rescore: samples.jsonl is damaged: line 1 is not JSON."),
    ],
)
def test_a_wrong_file_of_samples_is_named(
    content: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('"a"\n')
    if content is not None:
        Path("samples.jsonl").write_text(content)
    files = ["--prompts", "prompts.jsonl", "--rescore", "samples.jsonl", "--out", "a.safetensors"]
    assert cli.main(["fit", "value", "--reward", "quality", *files]) == 2
    assert message in capsys.readouterr().err


def run(words: str, redirection: str, **variables: str) -> tuple[int, str]:
    """Run a command in a shell; return its exit status, and what it wrote to standard error."""
    command = f"{sys.executable} -m infer_align_server {words} {redirection}"
    done = subprocess.run(
        ["/bin/bash", "-c", command], capture_output=True, text=True, check=False, env=variables
    )
    return done.returncode, done.stderr


@pytest.fixture
def environment() -> dict[str, str]:
    """Return the variables of a process that finds the modules of the repository."""
    return {"PYTHONPATH": ":".join(part for part in sys.path if part)}


def test_closed_and_full_outputs(environment: dict[str, str]) -> None:
    assert run("keys new team", ">&-", **environment) == (0, "")
    assert run("keys new team", "2>&- >&- <&-", **environment) == (0, "")
    status, error = run("keys new team", "> /dev/full", **environment)
    assert status == 1
    assert error == ("error: cannot write: No space left on device; the output is not complete.\n")
    status, error = run("keys new ''", ">&-", **environment)
    assert status == 2
    assert error.startswith("configuration: name: ''")


def test_a_character_that_the_output_lacks_is_escaped(environment: dict[str, str]) -> None:
    words = "config show --set engine.kind=fake --set engine.model=\u2603"
    status, error = run(words, "", PYTHONIOENCODING="ascii", **environment)
    assert (status, error) == (0, "")


@pytest.mark.parametrize(
    ("answer", "words", "message"),
    [
        (b"<html>", [], "/models: the answer is no list of models"),
        (b'{"data": []}', [], "/models: the answer is no list of models"),
        (b"data: <html>\n\n", ["--model", "m"], "sent '<html>' in a stream, which is no chunk"),
        (b"data: {}\n\n", ["--model", "m"], "sent '{}' in a stream, which is no chunk"),
        (b'data: {"error": "full"}\n\n', ["--model", "m"], "in a stream, which is no chunk"),
        (b'data: {"error": {"message": "full"}}\n\n', ["--model", "m"], "error: full"),
    ],
)
def test_a_chat_with_another_kind_of_server(
    answer: bytes, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def page(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": answer})

    server = ThreadedServer(page, lifespan="off")
    try:
        url = f"http://127.0.0.1:{server.port}/v1"
        assert cli.main(["chat", "hello", "--base-url", url, *words]) == 1
    finally:
        server.end()
    assert message in capsys.readouterr().err
