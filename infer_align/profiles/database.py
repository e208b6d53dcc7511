"""Transactions on SQLite or PostgreSQL, as functions of a SQLAlchemy connection.

A transaction is written once, as a function. PostgreSQL is reached by asyncpg, and SQLAlchemy runs
the function in the event loop. SQLite runs it in a thread, from its first statement to its commit:
a driver for event loops would hand each statement to a thread and back several times, which takes
20 times as long on a busy machine (0.6 ms against 11 ms for one choice). So a URL that names such a
driver means the same file as one without.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine

from infer_align.errors import ConfigError, Unavailable

log = logging.getLogger("infer_align")

# A statement that takes longer has failed, in seconds; so has waiting for a connection.
TIMEOUT_SECONDS = 10.0
CONNECTIONS = 5
# SQLite waits this long for another process that writes.
BUSY_SECONDS = 5.0
SQLITE = "sqlite"
POSTGRESQL = "postgresql+asyncpg"
# What other tools and providers write for the same database.
POSTGRESQL_NAMES = {POSTGRESQL, "postgresql", "postgres"}
MIGRATIONS = Path(__file__).parent / "migrations"
# Locks out other processes that migrate the same PostgreSQL database. The number has no meaning.
ADVISORY_LOCK = 7_340_133

# Alembic keeps the running migration in a module: one at a time per process.
_migrating = threading.Lock()
T = TypeVar("T")
Work = Callable[[Connection], T]


class StoreFailed(Unavailable):
    """503: the store of profiles does not answer, or cannot be written."""

    code = "store_unavailable"


class Database(ABC):
    """A database that holds the tables of `infer_align.profiles.schema`."""

    def __init__(self) -> None:
        """Begin closed: the tables are migrated at the first use."""
        self._opening = asyncio.Lock()
        self._is_open = False
        # Event loops keep weak references to tasks only.
        self._running: set[asyncio.Task[Any]] = set()

    async def run(self, work: Work[T], *, writes: bool = False) -> T:
        """Return the result of one transaction, which is committed or undone as a whole.

        It goes on if the caller is cancelled: a connection that is left in the middle of a
        statement is lost.

        Args:
            work: the transaction.
            writes: True if it changes anything.

        Raises:
            StoreFailed: nothing was changed.
        """
        task = asyncio.create_task(self._run_safely(work, writes=writes))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def _run_safely(self, work: Work[T], *, writes: bool) -> T:
        """Run a transaction. Whatever the database raises becomes a StoreFailed."""
        try:
            await self._open()
            return await self._transaction(work, writes=writes)
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            raise _failure(error) from error

    async def _open(self) -> None:
        """Bring the tables to the newest version, once."""
        async with self._opening:
            if self._is_open:
                return
            while not _migrating.acquire(blocking=False):
                await asyncio.sleep(0.01)
            try:
                await self._transaction(migrate, writes=True)
            except CommandError as error:
                raise StoreFailed(
                    "profiles: the store was made by a newer version of this server; update the "
                    "server, or use another store."
                ) from error
            finally:
                _migrating.release()
            self._is_open = True

    @abstractmethod
    async def _transaction(self, work: Work[T], *, writes: bool) -> T:
        """Return the result of one transaction."""

    async def close(self) -> None:
        """Finish the transactions whose callers were cancelled, then close all connections."""
        if self._running:
            await asyncio.wait(self._running)
        await self._disconnect()

    @abstractmethod
    async def _disconnect(self) -> None:
        """Close all connections; no transaction runs."""


class SqliteDatabase(Database):
    """A file, written by one transaction at a time and read beside it."""

    def __init__(self, url: URL) -> None:
        """Prepare the connections to the file of an URL."""
        super().__init__()
        self.engine = create_engine(
            url.set(drivername="sqlite"),
            connect_args={"timeout": BUSY_SECONDS},
            pool_size=CONNECTIONS,
            max_overflow=0,
            pool_timeout=TIMEOUT_SECONDS,
        )
        event.listen(self.engine, "connect", _prepare_sqlite)
        event.listen(self.engine, "begin", _begin_sqlite)
        self._threads = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="profiles")
        # There is one writer at a time: waiting here is fairer than waiting for the file's lock.
        self._writing = asyncio.Lock()

    async def _transaction(self, work: Work[T], *, writes: bool) -> T:
        loop = asyncio.get_running_loop()
        in_thread = partial(self._in_thread, work, writes=writes)
        if not writes:
            return await loop.run_in_executor(self._threads, in_thread)
        async with self._writing:
            return await loop.run_in_executor(self._threads, in_thread)

    def _in_thread(self, work: Work[T], *, writes: bool) -> T:
        with self.engine.connect() as connection:
            marked = connection.execution_options(writes=writes)
            with marked.begin():
                return work(marked)

    async def _disconnect(self) -> None:
        await asyncio.to_thread(self._threads.shutdown)
        self.engine.dispose()


class PostgresDatabase(Database):
    """A PostgreSQL server, which several servers on several machines may share."""

    def __init__(self, url: URL) -> None:
        """Prepare the connections to the server of an URL."""
        super().__init__()
        self.engine = create_async_engine(
            url.set(drivername=POSTGRESQL),
            connect_args={"timeout": BUSY_SECONDS, "command_timeout": TIMEOUT_SECONDS},
            pool_size=CONNECTIONS,
            max_overflow=0,
            pool_timeout=TIMEOUT_SECONDS,
            pool_pre_ping=True,
        )

    async def _transaction(self, work: Work[T], *, writes: bool) -> T:
        del writes
        async with self.engine.begin() as connection:
            return await connection.run_sync(work)

    async def _disconnect(self) -> None:
        await self.engine.dispose()


def open_database(text: str) -> Database:
    """Return the database of an URL.

    Raises:
        ConfigError: the URL is none, names another kind of database, or a package is missing.
    """
    try:
        url = make_url(text)
    except ArgumentError:
        raise ConfigError(
            "[profiles] store: it is no URL of a database; write one such as sqlite:///profiles.db."
        ) from None
    is_sqlite = url.drivername in {SQLITE, f"{SQLITE}+aiosqlite"}
    if not is_sqlite and url.drivername not in POSTGRESQL_NAMES:
        raise ConfigError(
            f"[profiles] store: {url.drivername!r} is not supported; the URL begins with "
            f"{SQLITE} or {POSTGRESQL}, such as sqlite:///profiles.db or "
            "postgresql+asyncpg://user:password@host/database."
        )
    try:
        return SqliteDatabase(url) if is_sqlite else PostgresDatabase(url)
    except (ImportError, NoSuchModuleError) as error:
        raise ConfigError(
            "[profiles] store: a package is missing; install it with: pip install "
            "'infer-align[store]'"
        ) from error


def sqlite_file(text: str) -> Path | None:
    """Return the file of an URL; None if the database is a server, or in memory.

    The URL is one that `open_database` takes.
    """
    url = make_url(text)
    is_file = url.drivername.startswith(SQLITE) and url.database not in {None, "", ":memory:"}
    # SQLite reads a name that begins with "file:" as an URI of its own, with options.
    if not is_file or str(url.database).startswith("file:"):
        return None
    return Path(str(url.database))


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


def migrate(connection: Connection) -> None:
    """Bring the tables to the newest version."""
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
