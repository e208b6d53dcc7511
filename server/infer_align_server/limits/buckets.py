"""The buckets of a rate limit: in this process, or in a file that several processes share."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple, Protocol

from infer_align.errors import Unavailable

# Above this number of buckets, full ones are deleted.
MAX_CALLERS = 10_000
# Longest wait for another process that writes, in seconds. A write takes microseconds.
LOCK_SECONDS = 5.0
_TABLE = """
CREATE TABLE IF NOT EXISTS buckets (
    unit TEXT, caller TEXT, amount REAL NOT NULL, time REAL NOT NULL, PRIMARY KEY (unit, caller)
) WITHOUT ROWID
"""


class Bucket(NamedTuple):
    """The content of a token bucket at a time in seconds of the clock."""

    amount: float
    time: float


class Buckets(Protocol):
    """The buckets of all callers. A caller without one has a full one."""

    def exclusive(self) -> AbstractContextManager[None]:
        """Keep other processes from changing a bucket inside the block."""

    def get(self, caller: str) -> Bucket | None:
        """Return the bucket of a caller."""

    def set(self, caller: str, bucket: Bucket) -> None:
        """Replace the bucket of a caller."""

    def sweep(self, size: float, per_second: float, now: float) -> None:
        """Delete full buckets if there are many.

        Args:
            size: The content of a full bucket.
            per_second: The speed at which a bucket fills.
            now: The time in seconds of the clock.
        """


class MemoryBuckets:
    """Buckets of this process alone."""

    def __init__(self) -> None:
        self._buckets: dict[str, Bucket] = {}
        self._sweep_size = MAX_CALLERS

    def __len__(self) -> int:
        return len(self._buckets)

    def exclusive(self) -> AbstractContextManager[None]:
        """Do nothing: no other process has these buckets."""
        return nullcontext()

    def get(self, caller: str) -> Bucket | None:
        """Return the bucket of a caller."""
        return self._buckets.get(caller)

    def set(self, caller: str, bucket: Bucket) -> None:
        """Replace the bucket of a caller."""
        self._buckets[caller] = bucket

    def sweep(self, size: float, per_second: float, now: float) -> None:
        """Delete full buckets if there are many."""
        if len(self._buckets) <= self._sweep_size:
            return
        self._buckets = {
            caller: bucket
            for caller, bucket in self._buckets.items()
            if bucket.amount + (now - bucket.time) * per_second < size
        }
        self._sweep_size = max(MAX_CALLERS, 2 * len(self._buckets))


class SharedBuckets:
    """Buckets in a SQLite file, for the workers of one server.

    The clock must be one that all processes of the machine share, such as `time.monotonic`. A
    worker that is killed inside `exclusive` changes nothing. The package `limits` does not fit: see
    `RateLimit`.

    Args:
        path: The file; see `make_file`.
        unit: The name of what is counted; each unit has buckets of its own.
    """

    def __init__(self, path: Path, unit: str) -> None:
        self._unit = unit
        self._connection = _connect(path)
        self._writes = 0

    @staticmethod
    def make_file(path: Path) -> None:
        """Make the file, before the workers open it."""
        connection = _connect(path)
        # The write-ahead log survives a killed worker. It need not survive the machine.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(_TABLE)
        connection.close()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other processes from changing a bucket inside the block.

        Raises:
            Unavailable: The file cannot be written.
        """
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise Unavailable(
                f"the limits that the workers share cannot be counted: {error}; is there space "
                "for temporary files?",
                retry_after=5,
            ) from error

    def get(self, caller: str) -> Bucket | None:
        """Return the bucket of a caller."""
        query = "SELECT amount, time FROM buckets WHERE unit = ? AND caller = ?"
        row = self._connection.execute(query, (self._unit, caller)).fetchone()
        return None if row is None else Bucket(*row)

    def set(self, caller: str, bucket: Bucket) -> None:
        """Replace the bucket of a caller."""
        self._writes += 1
        row = (self._unit, caller, bucket.amount, bucket.time)
        self._connection.execute("REPLACE INTO buckets VALUES (?, ?, ?, ?)", row)

    def sweep(self, size: float, per_second: float, now: float) -> None:
        """Delete full buckets after many writes."""
        if self._writes < MAX_CALLERS:
            return
        self._writes = 0
        condition = "unit = ? AND amount + (? - time) * ? >= ?"
        self._connection.execute(
            f"DELETE FROM buckets WHERE {condition}",  # noqa: S608
            (self._unit, now, per_second, size),
        )


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    return connection
