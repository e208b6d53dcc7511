"""Rates and token budgets that servers on several machines count in one PostgreSQL database."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from infer_align.config import Limits
from infer_align.errors import ConfigError, Overloaded
from infer_align_server.limits.rate_limit import StoredRateLimit
from infer_align_server.limits.storage import LimitStorage, StorageFailed, open_storage
from tests.postgres import Postgres, postgres
from tests.server.processes import LIMIT_SECONDS, LOCAL, Process

__all__ = ["postgres"]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("store")]

pytest.importorskip("asyncpg")
URL = "TEST_LIMIT_STORAGE"
CONFIG = f"""
[engine]
kind = "fake"
replies = [{{text = "owls eat mice and voles and many more"}}]
[limits]
storage_env = "{URL}"
storage_timeout_seconds = 30.0
"""
BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
Command = Callable[..., Process]
ConfigFile = Callable[[str], Path]


# One for all: each would open connections of its own.
HTTP = httpx2.Client(**LOCAL)


def post(url: str) -> httpx2.Response:
    return HTTP.post(f"{url}/v1/chat/completions", json=BODY)


def metric(url: str, name: str) -> float:
    lines = HTTP.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))


def failures(url: str) -> float:
    return metric(url, "infer_align_limit_storage_failures_total")


def limit(storage: LimitStorage, per_minute: int = 60) -> StoredRateLimit:
    return StoredRateLimit(per_minute, "things", "too_many", storage, counts_alone=False)


@pytest.mark.parametrize("setting", ["requests_per_minute = 5", "candidate_tokens_per_minute = 40"])
def test_two_servers_admit_together_what_one_may(
    postgres: Postgres, command: Command, config_file: ConfigFile, setting: str
) -> None:
    file = str(config_file(f"{CONFIG}{setting}\n"))
    database = {URL: postgres.new_database()}
    urls = [command(file, **database).url() for _ in range(2)]
    began = time.monotonic()
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(post, urls * 10))
    refilled = 5 * (time.monotonic() - began) / 60
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert 5 <= statuses.count(200) <= 5 + refilled
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert [failures(url) for url in urls] == [0, 0]


@pytest.mark.parametrize(
    ("mode", "statuses"), [("count_alone", [200, 200, 429]), ("refuse", [503] * 3)]
)
def test_a_killed_database_has_the_documented_effect(
    command: Command, config_file: ConfigFile, mode: str, statuses: list[int]
) -> None:
    limits = f'requests_per_minute = 2\nstorage_failure = "{mode}"\n'
    with tempfile.TemporaryDirectory(prefix="infer-align-postgres-") as folder:
        server = Postgres(Path(folder))
        file = str(config_file(CONFIG + limits))
        process = command(file, **{URL: server.new_database()})
        url = process.url()
        assert post(url).status_code == 200
        server.kill()
        answers = [post(url) for _ in range(3)]
        server.close()
    assert [answer.status_code for answer in answers] == statuses
    if mode == "refuse":
        assert answers[0].json()["error"]["code"] == "limits_unavailable"
        assert answers[0].headers["retry-after"] == "1"
    assert failures(url) >= 3
    lines = [e for e in process.events() if "storage of the limits" in e["event"]]
    assert len(lines) == 1, "an outage is logged once"


def test_a_database_that_returns_is_counted_in_again(
    command: Command, config_file: ConfigFile
) -> None:
    limits = 'requests_per_minute = 1000\nstorage_failure = "refuse"\n'
    with tempfile.TemporaryDirectory(prefix="infer-align-postgres-") as folder:
        server = Postgres(Path(folder))
        file = str(config_file(CONFIG + limits))
        process = command(file, **{URL: server.new_database()})
        url = process.url()
        assert post(url).status_code == 200
        server.kill()
        assert post(url).status_code == 503
        server.restart()
        end_time = time.monotonic() + LIMIT_SECONDS
        while post(url).status_code != 200:
            assert time.monotonic() < end_time
            time.sleep(0.1)
        assert post(url).status_code == 200
        server.close()
    process.log.find("the storage of the limits answers again")


@pytest.mark.anyio
async def test_a_database_that_hangs_holds_no_request_longer_than_the_timeout() -> None:
    counted: list[None] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://u:p@127.0.0.1:{silent.getsockname()[1]}/d"
        storage = LimitStorage(url, 0.05, lambda: counted.append(None))
        with pytest.raises(StorageFailed):
            await limit(storage).reserve("a")
        # Right after a failure it is not tried again.
        with pytest.raises(StorageFailed):
            await limit(storage).reserve("a")
        await storage.close()
    assert len(counted) == 2


@pytest.mark.anyio
async def test_unused_units_are_given_back_and_a_large_amount_needs_a_full_bucket(
    postgres: Postgres,
) -> None:
    url = await asyncio.to_thread(postgres.new_database)
    storage = LimitStorage(url, 30.0, lambda: None)
    first, second = limit(storage), limit(storage)
    give_back = await first.reserve("a", 50)
    with pytest.raises(Overloaded) as refused:
        await second.reserve("a", 50)
    # Forty units are missing, at one a second, less what the test took.
    assert refused.value.retry_after is not None
    assert 0 < refused.value.retry_after <= 40
    give_back(45)
    await storage.close()
    storage = LimitStorage(url, 30.0, lambda: None)
    await limit(storage).reserve("a", 50)
    await limit(storage).reserve("b", 500)
    with pytest.raises(Overloaded):
        await limit(storage).reserve("b", 1)
    await storage.close()


@pytest.mark.parametrize("url", ["", "redis://host", "sqlite:///a.db"])
def test_a_storage_that_is_no_postgresql_is_refused(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv(URL, url)
    fault = "holds no URL" if url else "is not set or empty"
    with pytest.raises(ConfigError, match=rf"storage_env.*{URL}.*{fault}.*postgresql\+asyncpg://"):
        open_storage(Limits(storage_env=URL), lambda: None)


@pytest.mark.parametrize("scheme", ["postgresql+asyncpg", "postgresql", "postgres"])
def test_a_url_may_name_the_driver_or_not(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    pytest.importorskip("asyncpg")
    monkeypatch.setenv(URL, f"{scheme}://user:password@host/database")
    assert open_storage(Limits(storage_env=URL), lambda: None) is not None
