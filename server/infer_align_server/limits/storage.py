"""The buckets of rate limits in a PostgreSQL database, which servers on several machines share.

One statement takes from a bucket, and the database's clock fills it, so that all servers together
never admit more than one would. The package `limits` does not fit: its storages for event loops
are Redis, memcached and MongoDB, and it gives nothing back of what a request reserved.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from infer_align.config import Limits
from infer_align.errors import ConfigError, Unavailable
from infer_align_server.limits.buckets import MAX_CALLERS

if TYPE_CHECKING:
    import asyncpg

log = logging.getLogger("infer_align")
T = TypeVar("T")

SCHEMES = ("postgresql+asyncpg://", "postgresql://", "postgres://")
CONNECTIONS = 8
# After a failure the database is left alone this long, so that requests do not wait for it in turn.
RETRY_SECONDS = 1.0
# Locks out other servers that make the table. The number has no meaning.
ADVISORY_LOCK = 7_340_134
# After a crash of the database the table is empty, and all buckets are full.
_TABLE = """
CREATE UNLOGGED TABLE IF NOT EXISTS infer_align_buckets (
    unit text, caller text, amount float8 NOT NULL, time float8 NOT NULL,
    PRIMARY KEY (unit, caller)
)
"""
# The clock is read after the row is locked. It may step back; then the bucket fills on from there.
_NOW = "extract(epoch FROM clock_timestamp())::float8"
_REFILLED = f"least($3::float8, b.amount + greatest(0, {_NOW} - b.time) * $4::float8)"
# $1 unit, $2 caller, $3 size, $4 units per second, $5 amount, $6 the least content that allows it.
_TAKE = f"""
INSERT INTO infer_align_buckets AS b (unit, caller, amount, time)
VALUES ($1, $2, $3::float8 - $5::float8, {_NOW})
ON CONFLICT (unit, caller) DO UPDATE SET amount = {_REFILLED} - $5::float8, time = {_NOW}
WHERE {_REFILLED} >= $6::float8
RETURNING amount
"""  # noqa: S608
_CONTENT = f"SELECT {_REFILLED} FROM infer_align_buckets b WHERE unit = $1 AND caller = $2"  # noqa: S608
_GIVE_BACK = f"""
UPDATE infer_align_buckets AS b SET amount = least($3::float8, {_REFILLED} + $5::float8),
    time = {_NOW}
WHERE unit = $1 AND caller = $2
"""  # noqa: S608
_SWEEP = f"""
DELETE FROM infer_align_buckets AS b
WHERE unit = $1 AND b.amount + ({_NOW} - b.time) * $3::float8 >= $2::float8
"""  # noqa: S608


_MESSAGE = "the limits that all servers share cannot be counted now; try again later."


class Key(NamedTuple):
    """The name of a bucket."""

    unit: str
    caller: str


class Refill(NamedTuple):
    """The size of a full bucket, and the units per second that it gains."""

    size: float
    per_second: float


class StorageFailed(Unavailable):
    """503: the limits that all servers share cannot be counted."""

    code = "limits_unavailable"


class LimitStorage:
    """The buckets of all callers, in one database.

    The database is reached at the first use. An outage is logged once, and so is its end.

    Args:
        url: The URL of the database.
        timeout_seconds: The longest time to wait for it.
        on_failure: Called for each count that it did not take.

    Raises:
        ConfigError: The package of the driver is not installed.
    """

    def __init__(self, url: str, timeout_seconds: float, on_failure: Callable[[], None]) -> None:
        try:
            # The driver is in an extra of the package.
            import asyncpg  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError(
                "[limits] storage_env: a package is missing; install it with: pip install "
                "'infer-align[store]'"
            ) from error
        self._on_failure = on_failure
        self._errors = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)
        # The driver knows the scheme without its own name.
        self._url = url.replace("postgresql+asyncpg://", "postgresql://", 1)
        self._timeout = timeout_seconds
        self._pool: asyncpg.Pool[Any] | None = None
        self._opening = asyncio.Lock()
        self._retry_time = 0.0
        self._is_down = False
        self._takes = 0
        # Event loops keep weak references to tasks only.
        self._running: set[asyncio.Task[None]] = set()

    async def take(self, key: Key, rate: Refill, amount: float, required: float) -> float | None:
        """Take from a bucket if it holds enough.

        Args:
            key: The bucket.
            rate: Its size and its speed.
            amount: The units to take.
            required: The content that allows it.

        Returns:
            None if the units were taken, else the content of the bucket.

        Raises:
            StorageFailed: The database does not answer in time.
        """
        self._takes += 1
        if self._takes % MAX_CALLERS == 0:
            self._start(self._run(lambda pool: pool.execute(_SWEEP, key.unit, *rate)))
        arguments = (*key, *rate, amount, required)
        after = await self._run(lambda pool: pool.fetchval(_TAKE, *arguments))
        if after is not None:
            return None
        content = await self._run(lambda pool: pool.fetchval(_CONTENT, *key, *rate))
        return float(content or 0.0)

    def give_back(self, key: Key, rate: Refill, amount: float) -> None:
        """Return units to a bucket, in the background; take more if `amount` is negative.

        What the database does not take is lost: the bucket fills again within a minute.
        """
        arguments = (*key, *rate, amount)
        self._start(self._run(lambda pool: pool.execute(_GIVE_BACK, *arguments)))

    async def close(self) -> None:
        """Finish what is given back, and close the connections."""
        if self._running:
            await asyncio.wait(self._running)
        if self._pool is not None:
            self._pool.terminate()

    def _start(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.create_task(_forgiving(work))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(self, query: Callable[[asyncpg.Pool[Any]], Awaitable[T]]) -> T:
        """Return the answer of the database.

        Raises:
            StorageFailed: There is none in time, or there was none a moment ago.
        """
        if monotonic() < self._retry_time:
            self._on_failure()
            raise StorageFailed(_MESSAGE, retry_after=RETRY_SECONDS)
        try:
            answer = await _in_time(self._ask(query), self._timeout)
        except self._errors as error:
            self._note_failure(error)
            raise StorageFailed(_MESSAGE, retry_after=RETRY_SECONDS) from error
        if self._is_down:
            self._is_down = False
            log.info("the storage of the limits answers again")
        return answer

    async def _ask(self, query: Callable[[asyncpg.Pool[Any]], Awaitable[T]]) -> T:
        return await query(await self._opened())

    async def _opened(self) -> asyncpg.Pool[Any]:
        """Return the connections; make the table at the first use."""
        async with self._opening:
            if self._pool is None:
                self._pool = await self._open()
            return self._pool

    async def _open(self) -> asyncpg.Pool[Any]:
        import asyncpg  # noqa: PLC0415

        pool = await asyncpg.create_pool(self._url, min_size=0, max_size=CONNECTIONS)
        try:
            async with pool.acquire() as connection, connection.transaction():
                await connection.execute(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})")
                await connection.execute(_TABLE)
        except BaseException:
            pool.terminate()
            raise
        return pool

    def _note_failure(self, error: BaseException) -> None:
        self._on_failure()
        self._retry_time = monotonic() + RETRY_SECONDS
        if not self._is_down:
            self._is_down = True
            reason = f"{type(error).__name__}: {error}"
            log.error("the storage of the limits does not answer", extra={"reason": reason})


async def _in_time(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """Return the result of the work.

    `asyncio.timeout` would wait until the driver has ended a statement that it cancels, and a
    database that hangs does not end it.

    Raises:
        TimeoutError: The work takes longer.
    """
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if task.done():
            return task.result()
        raise TimeoutError
    finally:
        task.cancel()
        # A task whose error nobody looks at is reported when it is deleted.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())


async def _forgiving(work: Coroutine[Any, Any, object]) -> None:
    """Do what nobody waits for; a failure has been counted and logged."""
    with suppress(StorageFailed):
        await work


def open_storage(limits: Limits, on_failure: Callable[[], None]) -> LimitStorage | None:
    """Return the storage that the configuration names; None if each server counts alone.

    Raises:
        ConfigError: The environment variable is not set, its URL is of another kind, or a package
            is missing.
    """
    if limits.storage_env is None:
        return None
    url = os.environ.get(limits.storage_env, "").strip()
    if not url.startswith(SCHEMES):
        fault = "holds no URL of a PostgreSQL database" if url else "is not set or empty"
        raise ConfigError(
            f"[limits] storage_env: the environment variable {limits.storage_env!r} {fault}; "
            "write one such as postgresql+asyncpg://user:password@host/database there."
        )
    return LimitStorage(url, limits.storage_timeout_seconds, on_failure)
