"""Keep profiles in a database: SQLite or PostgreSQL, by SQLAlchemy's URL.

A choice is one row, which is added and never changed. So clients that write at the same time lose
nothing, every replica reads what the others wrote, and a process that dies in the middle of a write
leaves either the whole choice or none.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, RowMapping, delete, event, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from infer_align.errors import ConfigError, Unavailable
from infer_align.methods.profile import Choice
from infer_align.profiles.records import StoredChoice, StoredProfile
from infer_align.profiles.schema import CHOICES, PROFILES

log = logging.getLogger("infer_align")

# The latest choices of a profile that are read. Older ones stay in the store.
MAX_READ = 1000
# A statement that takes longer has failed, in seconds; so has waiting for a connection.
TIMEOUT_SECONDS = 10.0
CONNECTIONS = 5
# SQLite waits this long for another process that writes.
BUSY_SECONDS = 5.0
DRIVERS = ("sqlite+aiosqlite", "postgresql+asyncpg")
MIGRATIONS = Path(__file__).parent / "migrations"
# Locks out other processes that migrate the same PostgreSQL database. The number has no meaning.
ADVISORY_LOCK = 7_340_133

# Alembic keeps the running migration in a module: one at a time per process.
_migrating = threading.Lock()
# Event loops keep weak references to tasks only.
_running: set[asyncio.Task[Any]] = set()
T = TypeVar("T")


class StoreFailed(Unavailable):
    """503: the store of profiles does not answer, or cannot be written."""

    code = "store_unavailable"


class ProfileStore:
    """The profiles of all owners. The database is opened at the first use."""

    def __init__(self, url: str) -> None:
        """Prepare the store.

        Args:
            url: SQLAlchemy's URL of the database.

        Raises:
            ConfigError: the URL is none, or names another kind of database.
        """
        self._engine = _engine(url)
        self._insert = sqlite.insert if _is_sqlite(self._engine.url) else postgresql.insert
        self._opening = asyncio.Lock()
        # SQLite has one writer at a time: waiting here is fairer than waiting for its lock.
        self._writing = asyncio.Lock()
        self._is_open = False

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()

    async def add(
        self,
        owner: str,
        profile_id: str,
        choices: Sequence[StoredChoice] = (),
        description: str | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Add choices to a profile, which is made if it does not exist.

        It is stored when this returns.

        Args:
            owner: whose profile it is.
            profile_id: its name.
            choices: to add.
            description: replaces the profile's; None leaves it.
            weights: replace those of the profile; None leaves them.

        Raises:
            StoreFailed: nothing was stored.
        """
        changes: dict[str, Any] = {"id": profile_id}
        if description is not None:
            changes["description"] = description
        if weights is not None:
            changes["weights"] = dict(weights)
        profile = {"owner": owner, "created_at": time.time(), **changes}
        statement = self._insert(PROFILES).values({"weights": {}, **profile})
        # The update of an existing row also locks it, so no one deletes it meanwhile.
        upsert = statement.on_conflict_do_update(index_elements=["owner", "id"], set_=changes)
        rows = [_choice_row(owner, profile_id, choice) for choice in choices]

        async def write() -> None:
            async with self._transaction(writes=True) as connection:
                await connection.execute(upsert)
                if rows:
                    await connection.execute(CHOICES.insert(), rows)

        await _uninterrupted(write())

    async def get(self, owner: str, profile_id: str) -> StoredProfile | None:
        """Return a profile with its latest choices; None if the owner has none of this name.

        Raises:
            StoreFailed: it could not be read.
        """
        is_profile = (PROFILES.c.owner == owner) & (PROFILES.c.id == profile_id)
        is_choice = (CHOICES.c.owner == owner) & (CHOICES.c.profile_id == profile_id)
        latest = select(CHOICES).where(is_choice).order_by(CHOICES.c.number.desc()).limit(MAX_READ)
        counting = select(func.count()).select_from(CHOICES).where(is_choice)

        async def read() -> StoredProfile | None:
            async with self._transaction() as connection:
                profile = (await connection.execute(select(PROFILES).where(is_profile))).first()
                if profile is None:
                    return None
                rows = (await connection.execute(latest)).all()
                total = len(rows)
                if total == MAX_READ:
                    total = (await connection.execute(counting)).scalar_one()
            return _stored_profile(profile._mapping, [row._mapping for row in rows], total)

        return await _uninterrupted(read())

    async def delete(self, owner: str, profile_id: str) -> bool:
        """Delete a profile and its choices; return False if the owner has none of this name.

        Raises:
            StoreFailed: nothing was deleted.
        """
        is_profile = (PROFILES.c.owner == owner) & (PROFILES.c.id == profile_id)
        is_choice = (CHOICES.c.owner == owner) & (CHOICES.c.profile_id == profile_id)

        async def write() -> bool:
            async with self._transaction(writes=True) as connection:
                deleted = await connection.execute(delete(PROFILES).where(is_profile))
                await connection.execute(delete(CHOICES).where(is_choice))
            return deleted.rowcount > 0

        return await _uninterrupted(write())

    async def overview(self) -> list[tuple[str, str, int, float]]:
        """Return (owner, id, choices, created at) of every profile, for the operator.

        Raises:
            StoreFailed: they could not be read.
        """
        is_its = (CHOICES.c.owner == PROFILES.c.owner) & (CHOICES.c.profile_id == PROFILES.c.id)
        count = select(func.count()).select_from(CHOICES).where(is_its).scalar_subquery()
        query = select(PROFILES.c.owner, PROFILES.c.id, count, PROFILES.c.created_at)
        async with self._transaction() as connection:
            rows = (await connection.execute(query.order_by(PROFILES.c.owner, PROFILES.c.id))).all()
        return [(row[0], row[1], row[2], row[3]) for row in rows]

    @asynccontextmanager
    async def _transaction(self, *, writes: bool = False) -> AsyncIterator[AsyncConnection]:
        """Open a transaction. Whatever the database raises becomes a StoreFailed."""
        try:
            await self._open()
            if not writes:
                async with self._engine.connect() as connection:
                    yield connection
                return
            async with self._turn_to_write(), self._connect_to_write() as connection:
                yield connection
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            raise _failure(error) from error

    @asynccontextmanager
    async def _turn_to_write(self) -> AsyncIterator[None]:
        if not _is_sqlite(self._engine.url):
            yield
            return
        async with self._writing:
            yield

    @asynccontextmanager
    async def _connect_to_write(self) -> AsyncIterator[AsyncConnection]:
        async with self._engine.connect() as connection:
            writing = await connection.execution_options(writes=True)
            async with writing.begin():
                yield writing

    async def _open(self) -> None:
        """Bring the tables to the newest version, once."""
        async with self._opening:
            if self._is_open:
                return
            while not _migrating.acquire(blocking=False):
                await asyncio.sleep(0.01)
            try:
                async with self._turn_to_write(), self._connect_to_write() as connection:
                    await connection.run_sync(_migrate)
            except CommandError as error:
                raise StoreFailed(
                    "profiles: the store was made by a newer version of this server; update the "
                    "server, or use another store."
                ) from error
            finally:
                _migrating.release()
            self._is_open = True


async def _uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Return the result of the work, which goes on if the caller is cancelled.

    A connection that is left in the middle of a statement keeps its thread for ever.
    """
    task = asyncio.create_task(work)
    _running.add(task)
    task.add_done_callback(_running.discard)
    return await asyncio.shield(task)


def _engine(text: str) -> AsyncEngine:
    try:
        url = make_url(text)
    except ArgumentError:
        raise ConfigError(
            "[profiles] store: it is no URL of a database; write one such as "
            "sqlite+aiosqlite:///profiles.db."
        ) from None
    if url.drivername not in DRIVERS:
        raise ConfigError(
            f"[profiles] store: {url.drivername!r} is not supported; the URL begins with "
            f"{' or '.join(DRIVERS)}."
        )
    arguments: dict[str, Any] = {"timeout": BUSY_SECONDS}
    if not _is_sqlite(url):
        arguments["command_timeout"] = TIMEOUT_SECONDS
    try:
        engine = create_async_engine(
            url,
            connect_args=arguments,
            pool_size=CONNECTIONS,
            max_overflow=0,
            pool_timeout=TIMEOUT_SECONDS,
            pool_pre_ping=not _is_sqlite(url),
        )
    except (ImportError, NoSuchModuleError) as error:
        raise ConfigError(
            "[profiles] store: a package is missing; install it with: pip install "
            "'infer-align[store]'"
        ) from error
    if _is_sqlite(url):
        event.listen(engine.sync_engine, "connect", _prepare_sqlite)
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _is_sqlite(url: URL) -> bool:
    return url.get_backend_name() == "sqlite"


def _prepare_sqlite(connection: Any, _: object) -> None:
    """Let readers and a writer work side by side, and let SQLAlchemy begin the transactions."""
    connection.isolation_level = None
    cursor = connection.cursor()
    try:
        cursor.execute("PRAGMA journal_mode = WAL")
        # What is committed survives the death of the process; a power cut may take the last rows.
        cursor.execute("PRAGMA synchronous = NORMAL")
    except connection.OperationalError as error:
        # A store that cannot be written can still be read.
        log.warning("profiles: %s", error)
    finally:
        cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    """Begin a transaction that cannot fail later because another process began to write."""
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})")
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _failure(error: Exception) -> StoreFailed:
    cause = getattr(error, "orig", None) or error
    log.error("the store of profiles failed", extra={"reason": f"{type(cause).__name__}: {cause}"})
    return StoreFailed(
        "profiles: the store does not answer, or cannot be written now; nothing was changed. Try "
        "again later. Requests without a profile id are answered as before.",
        retry_after=5,
    )


def _choice_row(owner: str, profile_id: str, choice: StoredChoice) -> dict[str, Any]:
    text = None
    if choice.text is not None:
        text = {
            "chosen": choice.text.chosen,
            "rejected": choice.text.rejected,
            "messages": list(choice.text.messages or ()),
        }
    return {
        "owner": owner,
        "profile_id": profile_id,
        "created_at": choice.created_at or time.time(),
        "differences": dict(choice.differences),
        "chosen_hash": choice.chosen_hash,
        "rejected_hash": choice.rejected_hash,
        "messages_hash": choice.messages_hash,
        "request_id": choice.request_id,
        "text": text,
    }


def _stored_profile(
    profile: RowMapping, latest_rows: Sequence[RowMapping], total: int
) -> StoredProfile:
    return StoredProfile(
        id=profile["id"],
        description=profile["description"],
        weights=profile["weights"],
        choices=tuple(_stored_choice(row) for row in reversed(latest_rows)),
        total=total,
        created_at=profile["created_at"],
    )


def _stored_choice(row: RowMapping) -> StoredChoice:
    text = None
    if row["text"] is not None:
        messages = tuple(row["text"]["messages"])
        text = Choice(row["text"]["chosen"], row["text"]["rejected"], messages)
    return StoredChoice(
        differences=row["differences"],
        chosen_hash=row["chosen_hash"],
        rejected_hash=row["rejected_hash"],
        messages_hash=row["messages_hash"],
        text=text,
        request_id=row["request_id"],
        created_at=row["created_at"],
    )
