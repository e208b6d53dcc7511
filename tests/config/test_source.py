"""Where settings come from: a file, the embedded demo, and the command line over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infer_align.config import Choices, Config, load
from infer_align.errors import ConfigError

URL = "http://127.0.0.1:8001/v1"


def own_settings(config: Config) -> tuple[Any, ...]:
    """Return what only the demo configures."""
    return config.rewards, config.values, config.presets, config.server.default_rewards


@pytest.mark.parametrize(
    "overrides",
    [
        ["engine.model=org/name"],
        ["engine.kind=fake"],
        ["engine.kind=openai", f"engine.urls={URL}"],
        [f"engine.urls={URL}"],
        [f'engine={{kind="openai", urls="{URL}"}}'],
        ['engine={model="org/name"}'],
        ["server.port=1", "engine.threads=1", "engine.model=org/name"],
    ],
)
def test_another_engine_drops_the_settings_of_the_demo(overrides: list[str]) -> None:
    pytest.importorskip("torch")
    config = load(None, overrides)
    assert own_settings(config) == ({}, {}, {}, {})
    assert config.server.served_name is None
    assert "the embedded demo" not in config.origins.values()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["engine.threads=1"],
        ["server.port=9"],
        ["engine.model=demo"],
        ["engine.kind=transformers"],
        ["engine.device=cpu", "limits.max_queue=3"],
    ],
)
def test_the_demo_keeps_its_settings(overrides: list[str]) -> None:
    pytest.importorskip("torch")
    config = load(None, overrides)
    assert all(own_settings(config))
    assert config.served_name == "demo"


def test_settings_of_the_command_line_stay_without_the_demo() -> None:
    pytest.importorskip("torch")
    config = load(None, ["engine.model=org/name", 'rewards.r={kind="rules"}', "server.port=9"])
    assert list(config.rewards) == ["r"]
    assert config.server.port == 9
    assert config.origins["engine.model"] == "--set"


def test_choices_write_their_settings() -> None:
    pytest.importorskip("torch")
    choices = Choices(model="org/name", host="::1", port=0, name="mine")
    config = load(None, [], choices)
    assert own_settings(config) == ({}, {}, {}, {})
    assert config.engine.model == "org/name"  # type: ignore[attr-defined]
    assert (config.server.host, config.server.port, config.served_name) == ("::1", 0, "mine")
    assert config.origins["server.port"] == "command line"


def test_an_override_wins_over_a_choice() -> None:
    config = load(None, ["server.port=2", "engine.kind=fake"], Choices(port=1))
    assert config.server.port == 2
    assert config.origins["server.port"] == "--set"


def test_an_upstream_replaces_an_engine_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "infer-align.toml"
    path.write_text(
        '[engine]\nkind = "transformers"\nmodel = "demo"\nthreads = 1\n'
        '[rewards.r]\nkind = "rules"\n'
    )
    config = load(path, [], Choices(upstream=URL, model="gpt"))
    settings = {name: value for name, value, _ in config.settings()}
    assert settings["engine.kind"] == "openai"
    assert settings["engine.urls"] == URL
    assert settings["engine.model"] == "gpt"
    assert list(config.rewards) == ["r"], "what the file configures beside the engine stays"


def test_an_upstream_keeps_the_options_of_an_upstream(tmp_path: Path) -> None:
    path = tmp_path / "infer-align.toml"
    path.write_text('[engine]\nkind = "openai"\nurls = "http://other/v1"\nretries = 7\n')
    config = load(path, [], Choices(upstream=URL))
    settings = {name: value for name, value, _ in config.settings()}
    assert (settings["engine.urls"], settings["engine.retries"]) == (URL, 7)


def test_a_model_is_served_under_its_own_name(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    folder = tmp_path / "my-llama"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    file = tmp_path / "Small.Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    names = {
        str(folder): "my-llama",
        f"{folder}/": "my-llama",
        f"{folder}/../my-llama": "my-llama",
        str(file): "Small.Q4_K_M",
        "HuggingFaceTB/SmolLM2-135M-Instruct": None,
        "gpt2": None,
    }
    for model, name in names.items():
        assert load(None, [], Choices(model=model)).served_name == name, model
    assert load(None, [], Choices(model=str(folder), name="other")).served_name == "other"


def test_the_name_of_an_upstream_is_the_one_it_reports(tmp_path: Path) -> None:
    # An upstream may call its model by a path that exists on this machine too.
    config = load(None, [], Choices(upstream=URL, model=str(tmp_path)))
    assert config.served_name is None


def test_a_section_that_is_a_setting_is_pointed_out() -> None:
    for name, meant in {"model": "engine.model", "port": "server.port"}.items():
        with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
            load(None, [f"{name}=x"])


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"infer-align serve {tmp_path}"):
        load(tmp_path)
