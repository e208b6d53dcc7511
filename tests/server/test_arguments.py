"""The arguments of the command line: what they choose, and what a wrong one should have been."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from infer_align.config import Config
from infer_align_server import cli
from infer_align_server.arguments import configuration

URL = "http://127.0.0.1:8001/v1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a model, without weights."""
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


def parse(*arguments: object) -> Config:
    """Return the configuration that `infer-align serve ...` would serve."""
    return configuration(cli.make_parser().parse_args(["serve", *map(str, arguments)]))


def settings(config: Config) -> dict[str, Any]:
    return {name: value for name, value, _ in config.settings()}


def test_a_model_can_be_named_in_four_ways(folder: Path) -> None:
    pytest.importorskip("torch")
    ways = [
        (folder,),
        ("--model", folder),
        ("-m", folder),
        ("--set", f"engine.model={folder}"),
    ]
    for way in ways:
        config = parse(*way, "--port", 0)
        assert settings(config)["engine.model"] == str(folder)
        assert config.served_name == "tiny"
        assert (config.rewards, config.presets, config.values) == ({}, {}, {})
        assert config.server.port == 0


def test_an_upstream_can_be_named_in_three_ways() -> None:
    ways = [
        ("--upstream", URL),
        ("--upstream", "127.0.0.1:8001/v1"),
        ("--set", "engine.kind=openai", "--set", f"engine.urls={URL}"),
    ]
    for way in ways:
        config = parse(*way)
        assert config.engine_kind == "openai"
        assert settings(config)["engine.urls"] == URL
        assert settings(config)["engine.model"] is None
        assert config.rewards == {}


def test_an_upstreams_model_can_be_named() -> None:
    for way in (("--model", "org/gpt"), ("org/gpt",)):
        config = parse("--upstream", URL, *way)
        assert settings(config)["engine.model"] == "org/gpt"


def test_a_configuration_can_be_named_in_two_ways(tmp_path: Path) -> None:
    path = tmp_path / "any.toml"
    path.write_text('[engine]\nkind = "fake"\nmodel = "x"\n[server]\nport = 5\n')
    other = tmp_path / "any.conf"
    other.write_text(path.read_text())
    for way in ((path,), ("--config", path), (other,), (path, "--config", path)):
        config = parse(*way, "--host", "::1", "--name", "me")
        assert config.engine_kind == "fake"
        assert (config.server.host, config.server.port) == ("::1", 5)
        assert config.served_name == "me"


def test_a_file_and_a_model_together(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "any.toml"
    path.write_text('[rewards.r]\nkind = "rules"\n')
    config = parse(folder, "--config", path)
    assert config.served_name == "tiny"
    assert list(config.rewards) == ["r"]


WRONG = [
    (["serve", "--prot", "1"], "there is no option --prot; did you mean --port?"),
    (["serve", "--served-model-name", "x"], "here it is --name NAME"),
    (["serve", "--base-url", "x"], "here it is --upstream URL"),
    (["serve", "--max-queue=3"], "write it as --set limits.max_queue=VALUE"),
    (["serve", "--dtype", "x"], "write it as --set engine.dtype=VALUE"),
    (["serve", "--nonsense"], "there is no option --nonsense; known: --config"),
    (["serve", "a", "b"], "one argument too many: 'b'"),
    (["serve", "--port", "many"], "'many' is not allowed"),
    (["chat", "--sistem", "x"], "did you mean --system?"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_a_wrong_option_shows_the_usage_of_its_command(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    error = capsys.readouterr().err
    assert f"usage: infer-align {arguments[0]}" in error
    assert message in error


def test_a_contradiction_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        [folder, "--model", "other"],
        [tmp_path / "a.toml", "--config", tmp_path / "b.toml"],
    ):
        assert cli.main(["config", "show", *map(str, arguments)]) == 2
        assert "name two different things" in capsys.readouterr().err


def test_a_url_is_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", URL]) == 2
    assert f"infer-align serve --upstream {URL}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("https://huggingface.co/ORG/NAME", "write 'ORG/NAME'."),
        ("file:///my/llama", "write '/my/llama'."),
        ("hf.co/ORG/NAME", "write 'ORG/NAME'."),
    ],
)
def test_a_url_of_a_model_is_told_its_name(
    model: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["config", "show", model]) == 2
    assert words in capsys.readouterr().err


def test_an_upstream_may_call_a_model_by_its_place_on_the_hub(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Ollama has models of this name.
    config = tmp_path / "ollama.toml"
    config.write_text('[engine]\nkind = "openai"\nurls = "http://127.0.0.1:11434/v1"\n')
    assert cli.main(["config", "show", str(config), "--model", "hf.co/ORG/NAME"]) == 0
    assert "hf.co/ORG/NAME" in capsys.readouterr().out


def test_a_file_of_a_models_folder_is_no_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(["config", "show", str(tmp_path / "config.json")]) == 2
    assert "is a file, but a model is a folder or a GGUF file" in capsys.readouterr().err


def test_an_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / ("a-long-name-" * 12)
    assert cli.main(["config", "show", f"{path}.toml"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


COMMANDS = [
    "serve",
    "chat",
    "methods",
    "fit value",
    "fit reward",
    "bench serve",
    "bench quality",
    "bench judge",
    "bench plan",
    "rewards check",
    "check dpa",
    "profiles list",
    "profiles show",
    "profiles export",
    "profiles delete",
    "keys new",
    "config show",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_the_purpose_and_ends_with_an_example_that_works(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command.split(), "--help"])
    text = capsys.readouterr().out
    usage, _, rest = text.partition("\n\n")
    assert usage.startswith(f"usage: infer-align {command} ")
    purpose = rest.partition("\n\n")[0]
    assert purpose[0].isupper()
    assert purpose.endswith(".")
    example = rest.partition("example:\n  infer-align ")[2].splitlines()[0]
    assert example.startswith(command)
    options = cli.make_parser().parse_args(shlex.split(example))
    assert callable(options.run)


def test_every_command_has_a_help_text_that_is_tested() -> None:
    names = {command.split()[0] for command in COMMANDS}
    text = cli.make_parser().format_help()
    listed = re.findall(r"^    (\w+) ", text, re.MULTILINE)
    assert set(listed) == names


def test_a_chat_completes_an_address_without_a_scheme(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "hello", "--base-url", "127.0.0.1:1/v1"]) == 1
    error = capsys.readouterr().err
    assert "http://127.0.0.1:1/v1/" in error
    assert "is the server running?" in error


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("infer-align ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "/x"], "--model stands after a command: infer-align serve --model /x"),
        (["--port=1"], "--port stands after a command: infer-align serve --port=1"),
        (["--versoin"], "there is no option --versoin; did you mean --version?"),
        (["serv", "/x"], "there is no command 'serv'; did you mean serve?"),
        (["./my model"], "write: infer-align serve './my model'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_first_word_that_is_no_command_is_named(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
