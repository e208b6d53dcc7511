"""A PostgreSQL server of the tests' own, reached by a socket in a temporary folder."""

from __future__ import annotations

import asyncio
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

# Where Debian keeps the programs; they are not on the path.
DEBIAN = Path("/usr/lib/postgresql")
USER = "tests"
LIMIT_SECONDS = 60
# PostgreSQL refuses to run as root.
UNPRIVILEGED = ("postgres", "nobody")


def program(name: str) -> str | None:
    """Return the path of a program of PostgreSQL; None if it is not installed."""
    paths = [str(path) for path in sorted(DEBIAN.glob(f"*/bin/{name}"))]
    return shutil.which(name) or (paths[-1] if paths else None)


def account() -> dict[str, object]:
    """Return the arguments of `subprocess` that run a program without the rights of root."""
    if os.geteuid() != 0:
        return {}
    for name in UNPRIVILEGED:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL does not run as root, and there is no other user")


class Postgres:
    """A running server."""

    def __init__(self, folder: Path) -> None:
        """Start a server with its data and its socket in a folder."""
        postgres, initdb = program("postgres"), program("initdb")
        if postgres is None or initdb is None:
            pytest.skip("PostgreSQL is not installed: its programs postgres and initdb")
        self.folder = folder
        self._numbers = itertools.count()
        rights = account()
        if rights:
            shutil.chown(folder, rights["user"], rights["group"])
        data = folder / "data"
        options: dict[str, Any] = {**rights, "cwd": folder, "env": {"PATH": os.environ["PATH"]}}
        subprocess.run(
            [initdb, "-D", data, "-U", USER, "-A", "trust", "-E", "UTF8", "--no-sync"],
            check=True,
            capture_output=True,
            **options,
        )
        # What is acknowledged is on the disk, as in production.
        self._log = (folder / "log").open("wb")
        self._options = {**options, "stderr": self._log, "stdout": self._log}
        self._command = [postgres, "-D", data, "-k", folder, "-c", "listen_addresses="]
        self._process = subprocess.Popen(self._command, **self._options)
        self._wait()

    def restart(self) -> None:
        """Start the server again after `kill`, with its data."""
        self._process = subprocess.Popen(self._command, **self._options)
        self._wait()

    def _wait(self) -> None:
        end_time = time.monotonic() + LIMIT_SECONDS
        while not self._answers():
            log = (self.folder / "log").read_text()
            assert self._process.poll() is None, log
            assert time.monotonic() < end_time, log
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            asyncio.run(self._execute("SELECT 1"))
        except (OSError, RuntimeError):
            return False
        return True

    async def _execute(self, statement: str) -> None:
        asyncpg = pytest.importorskip("asyncpg")
        try:
            connection = await asyncpg.connect(
                host=str(self.folder), user=USER, database="postgres"
            )
        except asyncpg.PostgresError as error:
            raise RuntimeError(str(error)) from error
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    async def fill(self, url: str, script: str) -> None:
        """Run the statements of a dump in a database of `new_database`."""
        asyncpg = pytest.importorskip("asyncpg")
        name = url.partition("///")[2].partition("?")[0]
        connection = await asyncpg.connect(host=str(self.folder), user=USER, database=name)
        try:
            await connection.execute(script)
        finally:
            await connection.close()

    def new_database(self) -> str:
        """Return the URL of a new, empty database."""
        name = f"test{next(self._numbers)}"
        asyncio.run(self._execute(f"CREATE DATABASE {name}"))
        query = urlencode({"host": self.folder, "user": USER})
        return f"postgresql+asyncpg:///{name}?{query}"

    def read_only(self, url: str) -> None:
        """Refuse every write to a database from now on."""
        name = url.partition(":///")[2].partition("?")[0]
        statement = f"ALTER DATABASE {name} SET default_transaction_read_only = on"
        asyncio.run(self._execute(statement))

    def kill(self) -> None:
        """End the server as a crash does."""
        # The immediate shutdown: its processes end without writing anything.
        self._process.send_signal(3)
        self._process.wait(LIMIT_SECONDS)

    def close(self) -> None:
        """End the server."""
        if self._process.poll() is None:
            self.kill()
        self._log.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running server, for all tests."""
    with tempfile.TemporaryDirectory(prefix="infer-align-postgres-") as folder:
        server = Postgres(Path(folder))
        yield server
        server.close()


@pytest.fixture(
    params=["sqlite", pytest.param("postgres", marks=[pytest.mark.slow])],
)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new store, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/profiles.db"
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_database()
