"""The pool chooses a host for each call, lets calls wait for a place, and loses no place."""

from __future__ import annotations

import asyncio
from time import monotonic

import pytest

from infer_align.errors import Unavailable
from infer_align.upstream import Address
from infer_align.upstream.pool import SUSPECT_FAILURES, Pool

pytestmark = pytest.mark.anyio


def reachable_pool(*weights: float, max_concurrency: int = 100) -> Pool:
    addresses = [Address(f"http://{i}", weight) for i, weight in enumerate(weights)]
    pool = Pool(addresses, max_concurrency)
    for host in pool.hosts:
        host.record_success()
    return pool


async def test_load_follows_weight() -> None:
    pool = reachable_pool(3.0, 1.0)
    for _ in range(40):
        await pool.acquire(None)
    assert [host.running for host in pool.hosts] == [30, 10]


async def test_hosts_that_are_down_suspect_or_just_failed_come_last() -> None:
    pool = reachable_pool(1.0, 1.0, 1.0)
    first, second, third = pool.hosts
    first.record_failure("gone")
    assert await pool.acquire(None, {second}) is third
    for _ in range(SUSPECT_FAILURES):
        third.record_failure()
    assert {await pool.acquire(None) for _ in range(5)} == {second}
    assert pool.health() is None


def test_a_host_that_stays_down_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    (host,) = reachable_pool(1.0).hosts
    for reason in ("refused.", "refused", "refused."):
        host.record_failure(reason)
    assert [record.message.rpartition(": ")[2] for record in caplog.records] == ["refused"]
    assert host.down_reason == "refused"


async def test_health_gives_the_reason_for_each_host_and_no_address() -> None:
    pool = reachable_pool(1.0, 1.0, 1.0)
    first, second, third = pool.hosts
    first.record_failure("gone")
    for host in (second, third):
        host.record_failure("refused")
    health = pool.health() or ""
    assert health == "upstream 1: gone; upstream 2: refused; upstream 3: refused"
    assert "http" not in health


async def test_a_host_that_is_down_is_tried_if_all_are_down() -> None:
    pool = reachable_pool(1.0, 1.0)
    for host in pool.hosts:
        host.record_failure("gone")
    assert await pool.acquire(None) in pool.hosts
    pool.hosts[0].record_success()
    assert await pool.acquire(None) is pool.hosts[0]


async def test_a_call_goes_to_a_host_that_serves_its_model() -> None:
    pool = reachable_pool(1.0, 1.0)
    pool.hosts[0].models = frozenset({"a"})
    pool.hosts[1].models = frozenset({"b"})
    assert {await pool.acquire("b") for _ in range(3)} == {pool.hosts[1]}
    with pytest.raises(Unavailable, match="'c'"):
        await pool.acquire("c")


async def test_waiters_are_served_in_order_and_a_cancelled_one_keeps_no_place() -> None:
    pool = reachable_pool(1.0, max_concurrency=2)
    (host,) = pool.hosts
    for _ in range(2):
        await pool.acquire(None)
    order: list[int] = []

    async def work(i: int) -> None:
        acquired = await pool.acquire(None)
        order.append(i)
        await asyncio.sleep(0)
        pool.release(acquired)

    tasks = [asyncio.create_task(work(i)) for i in range(10)]
    await asyncio.sleep(0)
    tasks[3].cancel()
    pool.release(host)
    # Waiter 0 has its place now, and is cancelled before it runs.
    tasks[0].cancel()
    pool.release(host)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [1, 2, 4, 5, 6, 7, 8, 9]
    assert host.running == 0


async def test_a_waiter_gets_a_host_that_has_recovered() -> None:
    pool = reachable_pool(1.0, 1.0, max_concurrency=1)
    first, second = pool.hosts
    second.record_failure("gone")
    await pool.acquire(None)
    waiting = asyncio.create_task(pool.acquire(None))
    await asyncio.sleep(0)
    assert not waiting.done()
    second.record_success()
    assert await waiting is second
    assert (first.running, second.running) == (1, 1)


async def test_a_waiter_fails_if_no_host_serves_its_model_any_more() -> None:
    pool = reachable_pool(1.0, max_concurrency=1)
    (host,) = pool.hosts
    host.models = frozenset({"a"})
    await pool.acquire("a")
    waiting = asyncio.create_task(pool.acquire("a"))
    await asyncio.sleep(0)
    host.models = frozenset({"b"})
    pool.wake()
    with pytest.raises(Unavailable, match="'a'"):
        await waiting
    pool.release(host)
    assert host.running == 0


async def test_a_host_that_has_been_down_long_enough_is_tried_again() -> None:
    recovery_seconds = 1000.0
    pool = Pool([Address("http://0"), Address("http://1")], 100, recovery_seconds)
    first, second = pool.hosts
    second.record_success()
    first.record_failure("gone")
    assert {await pool.acquire(None) for _ in range(4)} == {second}
    assert recovery_seconds < first.retry_at - monotonic() <= 2 * recovery_seconds
    first.retry_at = monotonic()
    assert await pool.acquire(None) is first
