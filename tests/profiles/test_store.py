from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from infer_align.errors import ConfigError
from infer_align.methods.profile import Choice
from infer_align.profiles.records import StoredChoice

pytest.importorskip("sqlalchemy")
pytest.importorskip("aiosqlite")
pytest.importorskip("alembic")

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, inspect

from infer_align.profiles import store as stores
from infer_align.profiles.schema import METADATA
from infer_align.profiles.store import ProfileStore, StoreFailed


def choice(number: float, text: Choice | None = None) -> StoredChoice:
    return StoredChoice({"brief": number}, "a", "b", "c", text, "request")


def url(path: Path) -> str:
    return f"sqlite+aiosqlite:///{path}"


def run(path: Path, work, options: str = ""):
    """Return the result of `work(store)` on a store in this file."""

    async def scenario():
        store = ProfileStore(url(path) + options)
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(scenario())


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    text = Choice("Yes.", "No.", ({"role": "user", "content": "Häuser 🦉?"},))

    async def work(store: ProfileStore):
        await store.add("ann", "u", [choice(1.0), choice(-2.5, text)], "A child.", {"brief": 0.5})
        await store.add("ann", "u", [choice(3.0)])
        return await store.get("ann", "u")

    profile = run(tmp_path / "p.db", work)
    assert [stored.differences["brief"] for stored in profile.choices] == [1.0, -2.5, 3.0]
    assert profile.choices[1].text == text
    assert (profile.total, profile.description, profile.weights) == (3, "A child.", {"brief": 0.5})
    assert profile.choices[0].request_id == "request"


def test_owners_share_nothing(tmp_path: Path) -> None:
    async def work(store: ProfileStore):
        await store.add("ann", "u", [choice(1.0)])
        await store.add("bob", "u", [choice(2.0), choice(3.0)])
        assert await store.delete("ann", "u")
        assert not await store.delete("ann", "u")
        return await store.get("ann", "u"), await store.get("bob", "u"), await store.overview()

    ann, bob, overview = run(tmp_path / "p.db", work)
    assert ann is None
    assert bob.total == 2
    assert [row[:3] for row in overview] == [("bob", "u", 2)]


def test_sql_in_a_name_is_a_name(tmp_path: Path) -> None:
    name = "'; DROP TABLE profiles; --"

    async def work(store: ProfileStore):
        assert await store.get("ann", name) is None
        await store.add("ann", name, [choice(1.0)])
        return await store.get("ann", name)

    assert run(tmp_path / "p.db", work).id == name


def test_the_latest_choices_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "MAX_READ", 3)

    async def work(store: ProfileStore):
        await store.add("ann", "u", [choice(float(i)) for i in range(7)])
        return await store.get("ann", "u")

    profile = run(tmp_path / "p.db", work)
    assert [stored.differences["brief"] for stored in profile.choices] == [4.0, 5.0, 6.0]
    assert profile.total == 7


def test_a_store_of_the_first_version_moves_forward(tmp_path: Path) -> None:
    path = tmp_path / "p.db"
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(stores.MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, "first")
        connection.exec_driver_sql("INSERT INTO profiles VALUES ('ann', 'u', 1.0)")
    engine.dispose()

    async def work(store: ProfileStore):
        await store.add("ann", "u", [choice(1.0)])
        return await store.get("ann", "u")

    profile = run(path, work)
    assert (profile.total, profile.description, profile.weights) == (1, "", {})


def test_the_migrations_make_the_tables_of_the_schema(tmp_path: Path) -> None:
    run(tmp_path / "p.db", lambda store: store.get("ann", "u"))
    engine = create_engine(f"sqlite:///{tmp_path / 'p.db'}")
    inspector = inspect(engine)
    for name, table in METADATA.tables.items():
        made = {column["name"]: column["nullable"] for column in inspector.get_columns(name)}
        assert made == {column.name: column.nullable for column in table.columns}
    engine.dispose()


def test_a_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "p.db", lambda store: store.get("ann", "u"))
    connection = sqlite3.connect(tmp_path / "p.db")
    connection.execute("UPDATE alembic_version SET version_num = 'later'")
    connection.commit()
    connection.close()
    with pytest.raises(StoreFailed, match="newer version"):
        run(tmp_path / "p.db", lambda store: store.get("ann", "u"))


def test_a_read_only_store_is_read_and_not_written(tmp_path: Path) -> None:
    path = tmp_path / "p.db"
    run(path, lambda store: store.add("ann", "u", [choice(1.0)]))

    async def work(store: ProfileStore):
        assert (await store.get("ann", "u")).total == 1
        with pytest.raises(StoreFailed) as caught:
            await store.add("ann", "u", [choice(2.0)])
        return caught.value

    error = asyncio.run(_read_only(path, work))
    assert (error.status, error.code, error.retry_after) == (503, "store_unavailable", 5)


async def _read_only(path: Path, work):
    store = ProfileStore(f"sqlite+aiosqlite:///file:{path}?mode=ro&uri=true")
    try:
        return await work(store)
    finally:
        await store.close()


def test_a_full_store_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "p.db"
    run(path, lambda store: store.add("ann", "u", [choice(1.0)]))

    async def work(store: ProfileStore):
        await store.get("ann", "u")
        limit = "PRAGMA max_page_count = 1"
        async with store._engine.connect() as connection:
            await connection.exec_driver_sql(limit)
        with pytest.raises(StoreFailed):
            await store.add("ann", "u", [choice(2.0, Choice("x" * 100_000, "y"))])
        return await store.get("ann", "u")

    assert run(path, work).total == 1


@pytest.mark.parametrize("text", ["mysql://host/db", "nothing", "sqlite:///p.db"])
def test_another_database_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"\[profiles\] store"):
        ProfileStore(text)


def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    async def work(store: ProfileStore):
        await asyncio.gather(*(store.add("ann", f"u{i % 3}", [choice(i)]) for i in range(30)))
        return [(await store.get("ann", f"u{i}")).total for i in range(3)]

    assert run(tmp_path / "p.db", work) == [10, 10, 10]


def test_a_cancelled_write_is_whole_and_leaves_no_connection_behind(tmp_path: Path) -> None:
    async def work(store: ProfileStore):
        tasks = [asyncio.create_task(store.add("ann", "u", [choice(i)])) for i in range(10)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await store.add("ann", "u", [choice(99)])
        return await store.get("ann", "u")

    assert run(tmp_path / "p.db", work).total >= 1


WRITER = """
import asyncio, sys
from infer_align.profiles.records import StoredChoice
from infer_align.profiles.store import ProfileStore

async def main():
    store = ProfileStore(sys.argv[1])
    number = 0
    while True:
        await store.add("ann", "u", [StoredChoice({"brief": float(number)}, "a", "b", "c")])
        print(number, flush=True)
        number += 1

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_all_that_it_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "p.db"
    arguments = [sys.executable, "-c", WRITER, url(path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        acknowledged = [writer.stdout.readline() for _ in range(20)]
        writer.send_signal(signal.SIGKILL)
        acknowledged += writer.stdout.readlines()
    numbers = [float(line) for line in acknowledged if line.endswith("\n")]
    profile = run(path, lambda store: store.get("ann", "u"))
    kept = [stored.differences["brief"] for stored in profile.choices]
    assert kept[: len(numbers)] == numbers
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
