"""Who takes the next call, who waits, and that no place is lost."""

from __future__ import annotations

import asyncio

import pytest

from infer_align.errors import Unavailable
from infer_align.upstream import Address
from infer_align.upstream.pool import AILING_FAILURES, Pool

pytestmark = pytest.mark.anyio


def pool(*weights: float, limit: int = 100) -> Pool:
    made = Pool([Address(f"http://{i}", weight) for i, weight in enumerate(weights)], limit)
    for host in made.hosts:
        host.answered()
    return made


async def test_load_follows_weight() -> None:
    shared = pool(3.0, 1.0)
    for _ in range(40):
        await shared.acquire(None)
    assert [host.running for host in shared.hosts] == [30, 10]


async def test_those_that_are_down_or_ailing_or_just_failed_come_last() -> None:
    three = pool(1.0, 1.0, 1.0)
    first, second, third = three.hosts
    first.failed("gone")
    assert await three.acquire(None, {second}) is third
    for _ in range(AILING_FAILURES):
        third.failed()
    assert {await three.acquire(None) for _ in range(5)} == {second}
    assert three.health() is None
    second.failed("gone")
    third.failed("gone")
    assert three.health() == "upstream 1: gone; upstream 2: gone; upstream 3: gone"
    assert "http" not in (three.health() or ""), "where it is, is nobody's business"
    assert await three.acquire(None) in three.hosts, "where all are down one is tried all the same"
    first.answered()
    assert await three.acquire(None) is first


async def test_a_model_is_asked_where_it_is() -> None:
    two = pool(1.0, 1.0)
    two.hosts[0].models = frozenset({"a"})
    two.hosts[1].models = frozenset({"b"})
    assert {await two.acquire("b") for _ in range(3)} == {two.hosts[1]}
    with pytest.raises(Unavailable, match="'c'"):
        await two.acquire("c")


async def test_those_who_wait_are_served_in_turn_and_who_leaves_takes_nothing_along() -> None:
    one = pool(1.0, limit=2)
    (host,) = one.hosts
    for _ in range(2):
        await one.acquire(None)
    order: list[int] = []

    async def work(i: int) -> None:
        taken = await one.acquire(None)
        order.append(i)
        await asyncio.sleep(0)
        one.release(taken)

    tasks = [asyncio.create_task(work(i)) for i in range(10)]
    await asyncio.sleep(0)
    tasks[3].cancel()
    one.release(host)
    tasks[0].cancel()  # in the very step in which its turn came
    one.release(host)
    await asyncio.wait(tasks, timeout=2)
    assert all(task.done() for task in tasks)
    assert order == [1, 2, 4, 5, 6, 7, 8, 9]
    assert host.running == 0


async def test_who_waits_goes_to_one_that_has_recovered() -> None:
    two = pool(1.0, 1.0, limit=1)
    first, second = two.hosts
    second.failed("gone")
    await two.acquire(None)
    waiting = asyncio.create_task(two.acquire(None))
    await asyncio.sleep(0)
    assert not waiting.done()
    second.answered()
    assert await asyncio.wait_for(waiting, 1) is second
    assert (first.running, second.running) == (1, 1)


async def test_who_waits_for_a_model_that_nobody_has_any_more_is_told_so() -> None:
    one = pool(1.0, limit=1)
    (host,) = one.hosts
    host.models = frozenset({"a"})
    await one.acquire("a")
    waiting = asyncio.create_task(one.acquire("a"))
    await asyncio.sleep(0)
    host.models = frozenset({"b"})
    one.wake()
    with pytest.raises(Unavailable, match="'a'"):
        await waiting
    one.release(host)
    assert host.running == 0


async def test_one_that_was_down_long_enough_is_tried_again() -> None:
    two = Pool([Address("http://0"), Address("http://1")], 100, recovery_seconds=0.02)
    first, second = two.hosts
    second.answered()
    first.failed("gone")
    assert {await two.acquire(None) for _ in range(4)} == {second}
    await asyncio.sleep(0.06)
    assert await two.acquire(None) is first
