"""Texts that are no TOML, and values that no setting can have, each named by its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from infer_align.config import load, override
from infer_align.config.toml_text import LARGEST, NotTomlError, parse_toml
from infer_align.errors import ConfigError

FAKE = '[engine]\nkind = "fake"\n'


@pytest.mark.parametrize(
    "text",
    ["x = " + "9" * 5000, "x = " + "[" * 60_000, "x = " + "{a=" * 60_000, "x", "x = 1\nx = 2"],
)
def test_a_text_that_is_no_toml_is_refused(text: str) -> None:
    with pytest.raises(NotTomlError):
        parse_toml(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nhost = 2020-01-02", r"server\.host: 2020-01-02 is a date .*\"2020-01-02\""),
        ("[server]\nhost = 07:32:00", r"server\.host: 07:32:00 is a date or a time"),
        ("[presets.p]\nx = [{y = 2020-01-02T01:02:03}]", r"presets\.p\.x\.0\.y: 2020-01-02T"),
        (f"[limits]\nmax_queue = {LARGEST + 1}", r"limits\.max_queue: an integer of 64 bits"),
        ("[limits]\nmax_queue = 0x" + "f" * 4000, r"limits\.max_queue: an integer of 16000 bits"),
        ('[server]\napi_keys_file = "a\\u0000b"', r"server\.api_keys_file: 'a\\x00b' .* NUL"),
        ('[rewards."a\\u0000b"]', r"rewards: the name 'a\\x00b' is not allowed"),
        ("[rewards.a" + ".b" * 5000 + "]", r"rewards\.a: is nested in more than 64 levels"),
    ],
)
def test_a_file_with_a_value_that_no_setting_has(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(f"{FAKE}{text}\n")
    with pytest.raises(ConfigError, match=message) as error:
        load(path)
    assert error.value.message.startswith(str(path))
    assert len(error.value.message) < 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("server.host=2020-01-02", r"server\.host: 2020-01-02 is a date"),
        ("limits.max_queue=0x" + "f" * 4000, r"limits\.max_queue: an integer of 16000 bits"),
        ("limits.max_queue=" + "9" * 5000, r"limits\.max_queue: '999.*\.\.\. is not allowed"),
        ("limits.max_queue=" + "[" * 60_000, r"limits\.max_queue: '\[\[.*\.\.\. is not allowed"),
        ("limits.max_queue=3\nother=4", r"limits\.max_queue: '3\\nother=4' is not allowed"),
        (".".join("a" * 100) + "=1", r"--set 'a\.a\..*: has more than 64 names"),
    ],
)
def test_an_override_with_a_value_that_no_setting_has(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load(None, ["engine.kind=fake", text])
    assert len(error.value.message) < 400


def test_an_override_names_its_own_option() -> None:
    with pytest.raises(ConfigError, match=r"^--fit '=1': must have the form .*rank=32"):
        override({}, "=1", "--fit")


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_files_of_other_systems_are_read(line_end: str, mark: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(f'{mark}{FAKE}model = "mod\u00e9l"\n'.replace("\n", line_end).encode())
    assert getattr(load(path).engine, "model") == "mod\u00e9l"  # noqa: B009 - any engine


def test_a_file_in_another_encoding_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(FAKE.encode("utf-16"))
    with pytest.raises(ConfigError, match=r"not UTF-8: .*save it as UTF-8"):
        load(path)


@pytest.mark.parametrize(
    "setting",
    [
        "server.host",
        "server.served_name",
        "server.api_keys_env",
        "server.api_keys_file",
        "telemetry.endpoint",
    ],
)
def test_an_empty_text_is_not_taken_for_no_setting(setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"{setting}: '' is not allowed; must have at least 1"):
        load(None, ["engine.kind=fake", f'{setting}=""'])


def test_a_default_that_every_request_would_fail_by_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"server\.default_max_tokens: .* 2147483648"):
        load(None, ["engine.kind=fake", f"server.default_max_tokens={2**31 + 1}"])
    with pytest.raises(ConfigError, match=r"engine\.replies: \[\] is not allowed"):
        load(None, ["engine.kind=fake", "engine.replies=[]"])


@pytest.mark.parametrize("model", ["x" * 100_000, "./" + "x" * 5000, "/" + "a/" * 3000])
def test_a_name_that_is_too_long_for_a_path(model: str) -> None:
    message = ""
    try:
        load(None, ["engine.kind=fake", f"engine.model={model}"])
    except ConfigError as error:
        message = error.message
    assert len(message) < 400
    assert ("no such folder" in message) == model.startswith((".", "/"))


def test_a_judges_engine_is_named_by_its_own_section() -> None:
    overrides = ["engine.kind=fake", "engines.judge.kind=fake", "engines.judge.model=./none-such"]
    with pytest.raises(ConfigError, match=r"^\[engines\.judge\] model: './none-such': no such"):
        load(None, overrides)
    wrong = ["engine.kind=openai", "engine.urls=ftp://x"]
    with pytest.raises(ConfigError, match=r"^\[engine\] urls: 'ftp://x' is not an http"):
        load(None, wrong).load_engine()
