"""The store of profiles, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from infer_align.errors import ConfigError
from infer_align.methods.profile import Choice
from infer_align.profiles.records import StoredChoice

pytest.importorskip("sqlalchemy")
pytest.importorskip("alembic")

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, inspect

from infer_align.profiles import cache
from infer_align.profiles import store as stores
from infer_align.profiles.database import MIGRATIONS, StoreFailed, open_database, sqlite_file
from infer_align.profiles.schema import METADATA
from infer_align.profiles.store import ProfileStore
from tests.postgres import Postgres

pytestmark = pytest.mark.xdist_group("store")


def choice(
    number: float, text: Choice | None = None, request_id: str | None = "request"
) -> StoredChoice:
    """A choice that differs from those of other numbers."""
    return StoredChoice({"brief": number}, "a", f"b{number}", "c", text, request_id)


def numbers(profile) -> list[float]:
    return [stored.differences["brief"] for stored in profile.choices]


def run(url: str, work):
    """Return the result of `work(store)` on the store of an URL."""

    async def scenario():
        store = ProfileStore(url)
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(scenario())


def run_in_database(url: str, work, version: str | None = None):
    """Return the result of `work(connection)` in one transaction, without our migrations.

    Args:
        url: of the database.
        work: the transaction.
        version: of the tables that are made before; None makes none.
    """

    def transaction(connection: Connection):
        if version is not None:
            config = Config()
            config.set_main_option("script_location", str(MIGRATIONS))
            config.attributes["connection"] = connection
            command.upgrade(config, version)
        return work(connection)

    async def scenario():
        database = open_database(url)
        try:
            return await database._transaction(transaction, writes=True)
        finally:
            await database.close()

    return asyncio.run(scenario())


def test_a_profile_is_read_as_it_was_written(store_url: str) -> None:
    text = Choice("Yes.", "No.", ({"role": "user", "content": "Häuser 🦉?"},))

    async def work(store: ProfileStore):
        await store.add("ann", "u", [choice(1.0), choice(-2.5, text)], "A child.", {"brief": 0.5})
        await store.add("ann", "u", [choice(3.0)])
        return await store.get("ann", "u")

    profile = run(store_url, work)
    assert numbers(profile) == [1.0, -2.5, 3.0]
    assert profile.choices[1].text == text
    assert (profile.total, profile.description, profile.weights) == (3, "A child.", {"brief": 0.5})
    assert profile.choices[0].request_id == "request"
    assert run(store_url, lambda store: store.get("ann", "u")) == profile


def test_adding_returns_the_profile_as_it_is_then(store_url: str) -> None:
    async def work(store: ProfileStore):
        added = [await store.add("ann", "u", [choice(1.0)]), await store.add("ann", "u")]
        added.append(await store.add("ann", "u", [choice(2.0), choice(3.0)], weights={"brief": 1}))
        assert added[-1].profile == await store.get("ann", "u")
        return added

    results = run(store_url, work)
    assert [each.profile.total for each in results] == [1, 1, 3]
    assert [each.added for each in results] == [1, 0, 2]


@pytest.mark.parametrize("request_id", [None, ""])
def test_without_a_request_every_choice_counts(store_url: str, request_id: str | None) -> None:
    async def work(store: ProfileStore):
        added = [await store.add("ann", "u", [choice(1.0, request_id=request_id)])]
        added.append(await store.add("ann", "u", [choice(1.0, request_id=request_id)]))
        return [(each.added, each.profile.total) for each in added]

    assert run(store_url, work) == [(1, 1), (1, 2)]


def test_a_choice_that_is_sent_again_counts_once(store_url: str) -> None:
    sent = choice(1.0)
    same_with_another_rating = replace(sent, differences={"brief": 0.5})
    others = [
        replace(sent, request_id="another"),
        replace(sent, messages_hash="d"),
        replace(sent, chosen_hash=sent.rejected_hash, rejected_hash=sent.chosen_hash),
    ]

    async def work(store: ProfileStore):
        replica = ProfileStore(store_url)
        try:
            await store.add("ann", "u", [sent])
            for each in (store, replica, store):
                again = await each.add("ann", "u", [same_with_another_rating], "A child.")
                assert (again.added, again.profile.total) == (0, 1)
                assert again.profile.description == "A child."
            mixed = await replica.add("ann", "u", [sent, *others])
            assert (mixed.added, mixed.profile.total) == (3, 4)
            # Another profile, and another owner, have choices of their own.
            assert (await store.add("ann", "v", [sent])).added == 1
            assert (await store.add("bob", "u", [sent])).added == 1
            return await store.get("ann", "u")
        finally:
            await replica.close()

    assert numbers(run(store_url, work)) == [1.0] * 4


def test_equal_choices_of_one_feedback_count_once(store_url: str) -> None:
    async def work(store: ProfileStore):
        sent = [choice(1.0), choice(2.0), choice(1.0)]
        return [await store.add("ann", "u", sent) for _ in range(2)]

    first, again = run(store_url, work)
    assert (first.added, first.profile.total) == (2, 2)
    assert (again.added, again.profile.total) == (0, 2)
    assert list(again.choices) == list(again.profile.choices)


def test_a_choice_that_is_sent_again_is_returned_as_it_is_stored(store_url: str) -> None:
    unscored = replace(choice(1.0), differences={})

    async def work(store: ProfileStore):
        await store.add("ann", "u", [unscored])
        return await store.add("ann", "u", [choice(1.0), choice(2.0)])

    again = run(store_url, work)
    assert again.added == 1
    assert [stored.differences for stored in again.choices] == [{}, {"brief": 2.0}]
    assert [stored.differences for stored in again.profile.choices] == [{}, {"brief": 2.0}]


def test_a_choice_is_compared_with_the_latest_ones_alone(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "MAX_READ", 3)

    async def work(store: ProfileStore):
        await store.add("ann", "u", [choice(float(i)) for i in range(4)])
        again = [await store.add("ann", "u", [choice(number)]) for number in (1.0, 0.0)]
        return [each.added for each in again]

    assert run(store_url, work) == [0, 1]


def test_a_choice_that_is_sent_to_many_replicas_at_once_counts_once(store_url: str) -> None:
    async def scenario():
        replicas = [ProfileStore(store_url) for _ in range(3)]
        writes = [each.add("ann", "u", [choice(1.0)]) for each in replicas for _ in range(5)]
        added = sum(each.added for each in await asyncio.gather(*writes))
        totals = [(await each.get("ann", "u")).total for each in replicas]
        await asyncio.gather(*(each.close() for each in replicas))
        return added, totals

    assert asyncio.run(scenario()) == (1, [1, 1, 1])


def test_owners_share_nothing(store_url: str) -> None:
    async def work(store: ProfileStore):
        await store.add("ann", "u", [choice(1.0)])
        await store.add("bob", "u", [choice(2.0), choice(3.0)])
        assert await store.delete("ann", "u")
        assert not await store.delete("ann", "u")
        return await store.get("ann", "u"), await store.get("bob", "u"), await store.overview()

    ann, bob, overview = run(store_url, work)
    assert ann is None
    assert bob.total == 2
    assert [row[:3] for row in overview] == [("bob", "u", 2)]


def test_sql_in_a_name_is_a_name(store_url: str) -> None:
    name = "'; DROP TABLE profiles; --"

    async def work(store: ProfileStore):
        assert await store.get("ann", name) is None
        await store.add("ann", name, [choice(1.0)])
        return await store.get("ann", name)

    assert run(store_url, work).id == name


def test_the_latest_choices_are_read(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "MAX_READ", 3)

    async def work(store: ProfileStore):
        await store.add("ann", "u", [choice(float(i)) for i in range(7)])
        first = await store.get("ann", "u")
        await store.add("ann", "u", [choice(7.0)])
        return first, await store.get("ann", "u")

    first, second = run(store_url, work)
    assert (numbers(first), first.total) == ([4.0, 5.0, 6.0], 7)
    assert (numbers(second), second.total) == ([5.0, 6.0, 7.0], 8)


def test_a_replica_reads_what_another_one_wrote(store_url: str) -> None:
    async def work(store: ProfileStore):
        replica = ProfileStore(store_url)
        try:
            totals = []
            for i in range(3):
                await store.add("ann", "u", [choice(float(i))])
                await replica.add("ann", "u", [choice(i + 0.5)])
                totals += [(await each.get("ann", "u")).total for each in (store, replica)]
            return totals
        finally:
            await replica.close()

    assert run(store_url, work) == [2, 2, 4, 4, 6, 6]


def test_a_profile_that_a_replica_made_anew_has_no_earlier_choices(store_url: str) -> None:
    async def work(store: ProfileStore):
        await store.add("ann", "u", [choice(1.0), choice(2.0)])
        replica = ProfileStore(store_url)
        try:
            assert await replica.delete("ann", "u")
            await replica.add("ann", "u", [choice(9.0)])
        finally:
            await replica.close()
        return await store.get("ann", "u")

    assert numbers(run(store_url, work)) == [9.0]


def test_the_choices_in_memory_are_bounded(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAX_CHOICES", 5)

    async def work(store: ProfileStore):
        for i in range(6):
            await store.add("ann", f"u{i}", [choice(1.0), choice(2.0)])
        assert len(store._cache._profiles) == 2
        return [(await store.get("ann", f"u{i}")).total for i in range(6)]

    assert run(store_url, work) == [2] * 6


def test_a_store_of_the_first_version_moves_forward(store_url: str) -> None:
    def fill(connection: Connection) -> None:
        connection.exec_driver_sql("INSERT INTO profiles VALUES ('ann', 'u', 1.0)")
        connection.exec_driver_sql(
            "INSERT INTO choices (owner, profile_id, created_at, differences, chosen_hash, "
            "rejected_hash, messages_hash) "
            "VALUES ('ann', 'u', 1.0, '{\"brief\": 4}', 'a', 'b', 'c')"
        )

    run_in_database(store_url, fill, "first")

    async def work(store: ProfileStore):
        await store.add("ann", "u", [choice(1.0)])
        return await store.get("ann", "u")

    profile = run(store_url, work)
    assert (numbers(profile), profile.description, profile.weights) == ([4.0, 1.0], "", {})


def test_replicas_that_migrate_at_once_do_it_once(store_url: str) -> None:
    run_in_database(store_url, lambda _: None, "first")

    async def scenario():
        replicas = [ProfileStore(store_url) for _ in range(4)]
        writes = [each.add("ann", "u", [choice(i)]) for i, each in enumerate(replicas)]
        await asyncio.gather(*writes)
        profile = await replicas[0].get("ann", "u")
        await asyncio.gather(*(each.close() for each in replicas))
        return profile.total

    assert asyncio.run(scenario()) == 4


def test_the_migrations_make_the_tables_of_the_schema(store_url: str) -> None:
    run(store_url, lambda store: store.get("ann", "u"))

    def columns(connection: Connection):
        inspector = inspect(connection)
        return {name: inspector.get_columns(name) for name in METADATA.tables}

    made = run_in_database(store_url, columns)
    for name, table in METADATA.tables.items():
        nullable = {column["name"]: column["nullable"] for column in made[name]}
        assert nullable == {column.name: column.nullable for column in table.columns}


def test_a_store_of_a_newer_version_is_refused(store_url: str) -> None:
    run(store_url, lambda store: store.get("ann", "u"))
    later = "UPDATE alembic_version SET version_num = 'later'"
    run_in_database(store_url, lambda connection: connection.exec_driver_sql(later).rowcount)
    with pytest.raises(StoreFailed, match="newer version"):
        run(store_url, lambda store: store.get("ann", "u"))


async def _refuses_to_write(store: ProfileStore) -> StoreFailed:
    assert (await store.get("ann", "u")).total == 1
    with pytest.raises(StoreFailed) as caught:
        await store.add("ann", "u", [choice(2.0)])
    assert (await store.get("ann", "u")).total == 1
    return caught.value


def test_a_read_only_file_is_read_and_not_written(tmp_path: Path) -> None:
    path = tmp_path / "p.db"
    run(f"sqlite+aiosqlite:///{path}", lambda store: store.add("ann", "u", [choice(1.0)]))
    error = run(f"sqlite+aiosqlite:///file:{path}?mode=ro&uri=true", _refuses_to_write)
    assert (error.status, error.code, error.retry_after) == (503, "store_unavailable", 5)


@pytest.mark.slow
def test_a_read_only_server_is_read_and_not_written(postgres: Postgres) -> None:
    url = postgres.new_database()
    run(url, lambda store: store.add("ann", "u", [choice(1.0)]))
    postgres.read_only(url)
    assert run(url, _refuses_to_write).status == 503


def test_a_full_store_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path}/p.db"
    run(url, lambda store: store.add("ann", "u", [choice(1.0)]))

    async def work(store: ProfileStore):
        await store.get("ann", "u")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        # No file can grow: for the database, the disk is full.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        try:
            with pytest.raises(StoreFailed):
                await store.add("ann", "u", [choice(2.0, Choice("x" * 1_000_000, "y"))])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        kept = await store.get("ann", "u")
        return kept, (await store.add("ann", "u", [choice(3.0)])).profile

    kept, later = run(url, work)
    assert (numbers(kept), numbers(later)) == ([1.0], [1.0, 3.0])


@pytest.mark.parametrize("text", ["mysql://host/db", "nothing", "sqlite+pysqlcipher:///p.db"])
def test_another_database_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"\[profiles\] store"):
        ProfileStore(text)


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("sqlite:///p.db", Path("p.db")),
        ("sqlite+aiosqlite:////data/p.db", Path("/data/p.db")),
        ("sqlite://", None),
        ("sqlite:///:memory:", None),
        ("sqlite:///file:p.db?mode=ro&uri=true", None),
        ("postgresql+asyncpg://host/p.db", None),
    ],
)
def test_the_file_of_an_url(url: str, file: Path | None) -> None:
    assert sqlite_file(url) == file


def test_many_writers_lose_nothing(store_url: str) -> None:
    async def work(store: ProfileStore):
        await asyncio.gather(*(store.add("ann", f"u{i % 3}", [choice(i)]) for i in range(30)))
        return [(await store.get("ann", f"u{i}")).total for i in range(3)]

    assert run(store_url, work) == [10, 10, 10]


def test_a_cancelled_write_is_whole_and_leaves_no_connection_behind(store_url: str) -> None:
    async def work(store: ProfileStore):
        tasks = [asyncio.create_task(store.add("ann", "u", [choice(i)])) for i in range(10)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await store.add("ann", "u", [choice(99)])
        return await store.get("ann", "u")

    assert run(store_url, work).total >= 1


def test_the_end_finishes_the_writes_whose_callers_were_cancelled(store_url: str) -> None:
    async def work(store: ProfileStore) -> None:
        tasks = [asyncio.create_task(store.add("ann", "u", [choice(i)])) for i in range(10)]
        # Each write begins.
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def total(store: ProfileStore) -> int:
        return (await store.get("ann", "u")).total

    run(store_url, work)
    # A connection that was left behind is reported here, not in another test.
    gc.collect()
    assert run(store_url, total) == 10


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
def test_a_killed_writer_leaves_all_that_it_acknowledged(store_url: str) -> None:
    arguments = [sys.executable, "-c", WRITER, store_url]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        acknowledged = [writer.stdout.readline() for _ in range(20)]
        writer.send_signal(signal.SIGKILL)
        acknowledged += writer.stdout.readlines()
    written = [float(line) for line in acknowledged if line.endswith("\n")]
    profile = run(store_url, lambda store: store.get("ann", "u"))
    assert numbers(profile)[: len(written)] == written
    if store_url.startswith("sqlite"):
        connection = sqlite3.connect(store_url.partition(":///")[2])
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.close()
