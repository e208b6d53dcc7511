"""Today's server reads what older versions wrote: their stores and their configurations.

The files of `tests/data/older` were written by the code of older versions; its README says how.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlalchemy")
pytest.importorskip("alembic")

from infer_align import config as configuration
from infer_align.errors import ConfigError
from tests.postgres import Postgres, postgres
from tests.server.conftest import Live, end, start

__all__ = ["postgres"]

pytestmark = pytest.mark.xdist_group("store")
OLDER = Path(__file__).parents[1] / "data/older"
KEY = {"Authorization": "Bearer old-key"}


@pytest.fixture(params=["sqlite", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of database."""
    return str(request.param)


@pytest.fixture
def upgraded(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Live]:
    """Today's server with the configuration and the store of an older one."""
    if kind == "sqlite":
        shutil.copy(OLDER / "sqlite.store", tmp_path / "profiles.db")
        # The older server had a driver for event loops, which the URL names.
        url = f"sqlite+aiosqlite:///{tmp_path}/profiles.db"
    else:
        server: Postgres = request.getfixturevalue("postgres")
        url = server.new_database()
        asyncio.run(server.fill(url, (OLDER / "profiles.sql").read_text(encoding="utf-8")))
    monkeypatch.setenv("OLD_STORE", url)
    monkeypatch.setenv("OLD_KEYS", "old-key")
    live = start(configuration.load(OLDER / "infer-align.toml"))
    yield live
    end(live)


def test_profiles_of_an_older_store_are_read_and_go_on(upgraded: Live, kind: str) -> None:
    written: dict[str, Any] = json.loads((OLDER / f"{kind}.json").read_text(encoding="utf-8"))
    profile = upgraded.get("/v1/align/profiles/ada", headers=KEY).json()
    export = upgraded.get("/v1/align/profiles/ada/export", headers=KEY).json()
    assert export == written["export"]
    # A later version lets no weight that keeps its sign reach 0.
    assert written["profile"]["bounds"].pop("brevity") == [0.0, 6.0]
    assert profile["bounds"].pop("brevity") == [0.02, 6.0]
    assert {key: profile[key] for key in written["profile"]} == written["profile"]
    messages = [{"role": "user", "content": "And mice?"}]
    feedback = {"profile": "ada", "messages": messages, "chosen": "a", "rejected": "b c"}
    added = upgraded.post(feedback, "/v1/align/feedback", headers=KEY).json()
    assert (added["added"], added["choices"]) == (1, len(written["export"]["choices"]) + 1)
    align = {"profile": {"id": "ada"}, "best_of_n": {"n": 2}}
    answer = upgraded.post(
        {"messages": messages, "align": align}, "/v1/chat/completions", headers=KEY
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["align"]["profile"]["id"] == "ada"


def test_the_profiles_of_another_key_stay_its_own(upgraded: Live) -> None:
    answer = upgraded.get("/v1/align/profiles/ada", headers={"Authorization": "Bearer other"})
    assert answer.status_code == 401


def test_the_configuration_of_an_older_demo_starts() -> None:
    config = configuration.load(OLDER / "demo.toml")
    assert {"quality", "preference", "trust_judge"} <= config.rewards.keys()
    assert "careful" in config.presets


def test_a_key_that_an_older_file_may_have_is_refused_with_its_fix(tmp_path: Path) -> None:
    text = (OLDER / "infer-align.toml").read_text(encoding="utf-8")
    # A preset was taken with parameters that its rule does not read.
    path = tmp_path / "infer-align.toml"
    path.write_text(f"{text}[presets.lottery]\nselect = {{ beta = 0.5 }}\n", encoding="utf-8")
    message = re.escape("[presets.lottery] align.select.beta: 0.5 is not read if rule is 'argmax'")
    with pytest.raises(ConfigError, match=f"{message}.*Leave beta out"):
        configuration.load(path)
