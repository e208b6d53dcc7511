"""The commands `infer-align profiles`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from infer_align.profiles.records import StoredChoice
from infer_align_server.cli import main

pytest.importorskip("alembic")
stores = pytest.importorskip("infer_align.profiles.store")

CONFIG = """
[profiles]
store = "sqlite+aiosqlite:///{path}"
spreads = {{brief = 0.5}}
[server]
default_rewards = {{brief = 0.0}}
[engine]
kind = "fake"
[rewards.brief]
kind = "rules"
words_weight = -1.0
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    """Return the path of a configuration whose store has three profiles of two owners."""
    path = tmp_path / "profiles.db"

    async def fill() -> None:
        store = stores.ProfileStore(f"sqlite+aiosqlite:///{path}")
        choice = StoredChoice({"brief": 2.0}, "a", "b", "c")
        await store.add("11aa", "u17", [choice, choice], "Likes it brief.")
        await store.add("22bb", "both", [choice])
        await store.add("11aa", "both", [choice])
        await store.close()

    asyncio.run(fill())
    file = tmp_path / "infer-align.toml"
    file.write_text(CONFIG.format(path=path), encoding="utf-8")
    return str(file)


def test_profiles_are_listed(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles", "list", config]) == 0
    printed = capsys.readouterr().out
    assert printed.count("both") == 2
    assert "u17" in printed


def test_a_profile_is_shown_in_words(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles", "show", "u17", config]) == 0
    printed = capsys.readouterr().out
    assert "u17: 2 choices" in printed
    assert "Likes it brief." in printed
    assert "brief: probably matters more than at the start" in printed


def test_a_profile_is_exported_as_json(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles", "export", "u17", "--config", config]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert exported["id"] == "u17"
    assert [choice["differences"] for choice in exported["choices"]] == [{"brief": 2.0}] * 2


def test_a_deleted_profile_is_gone(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles", "delete", "u17", config]) == 0
    assert main(["profiles", "show", "u17", config]) == 1
    assert "there is no profile 'u17'" in capsys.readouterr().err


def test_a_name_of_two_owners_needs_the_owner(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profiles", "delete", "both", config]) == 2
    assert "11aa, 22bb" in capsys.readouterr().err
    assert main(["profiles", "delete", "both", config, "--owner", "22"]) == 0
    assert main(["profiles", "show", "both", config]) == 0


def test_without_a_store_there_is_nothing_to_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles", "list"]) == 2
    assert "[profiles] store" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["profiles", "list"],
        ["profiles", "show", "u17"],
        ["profiles", "export", "u17"],
        ["profiles", "delete", "u17"],
        ["fit", "reward", "--profiles"],
    ],
)
def test_a_store_that_does_not_exist_is_not_made(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "infer-align.toml"
    path = tmp_path / "mistyped.db"
    file.write_text(CONFIG.format(path=path), encoding="utf-8")
    assert main([*words, "--config", str(file)]) == 2
    assert f"the file '{path}' does not exist" in capsys.readouterr().err
    assert not path.exists()
