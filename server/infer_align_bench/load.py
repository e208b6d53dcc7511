"""The two loops. Closed: a new request when one ends. Open: at random times, whatever the endpoint does.

In the open loop latency counts from the time at which a request was due, not from when it could be sent: an endpoint that stalls
keeps every request waiting that came meanwhile, and the percentiles must say so ("coordinated omission").
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from infer_align_bench.types import Load, Prompt, Run, Sample


class Sender(Protocol):
    """What `Endpoint.send` does."""

    def __call__(self, prompt: Prompt, index: int, began: float, intended: float | None = None) -> Awaitable[Sample]:
        """One request, timed."""


def turns(index: int, count: int, seed: int) -> list[int]:
    """In which order pair `index` asks its `count` targets: random, and the next pair the other way round, so that none leads."""
    flip = random.Random(f"{seed}/{index // 2}").random() < 0.5  # noqa: S311 - an order, no secret
    order = list(range(count))
    return order[::-1] if flip != bool(index % 2) else order


def arrivals(rate: float, seed: int, target: int) -> Iterator[float]:
    """The times of a Poisson process, seconds from 0, without end; another for each target."""
    chance = np.random.default_rng([seed, target])
    now = 0.0
    while True:
        now += float(chance.exponential(1 / rate))
        yield now


async def run(
    load: Load,
    prompts: Sequence[Prompt],
    senders: Sequence[Sender],
    stop: asyncio.Event,
    on_sample: Callable[[Sample], None] = lambda _: None,
) -> Run:
    """Apply a load to one target, or to two in turns, until its requests or its time are over, or `stop` is set."""
    samples: list[Sample] = []
    under_way = 0
    began = perf_counter()

    async def send(target: int, index: int, intended: float | None = None) -> None:
        nonlocal under_way
        under_way += 1
        sample = await senders[target](prompts[index % len(prompts)], index, began, intended)
        under_way -= 1
        samples.append(sample)
        on_sample(sample)

    loop = _open(load, len(senders), send, began) if load.open else _closed(load, len(senders), send, began)
    interrupted = not await until(stop, loop)
    return Run(tuple(samples), perf_counter() - began, interrupted, under_way if interrupted else 0)


async def until(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Let `work` run to its end, or cancel it when `stop` is set; -> whether it came to its end. Its first error is raised."""
    working, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
        ended = working.done()
    finally:
        stopped.cancel()
        working.cancel()
        try:
            await working
        except asyncio.CancelledError:
            pass
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
    return ended


Send = Callable[..., Awaitable[None]]


async def _closed(load: Load, targets: int, send: Send, began: float) -> None:
    pairs = iter(itertools.count() if load.requests is None else range(load.requests))

    async def worker() -> None:
        for index in pairs:
            if load.duration is not None and perf_counter() - began >= load.duration:
                return
            for target in turns(index, targets, load.seed):
                await send(target, index)

    async with asyncio.TaskGroup() as group:
        for _ in range(load.concurrency or 1):
            group.create_task(worker())


async def _open(load: Load, targets: int, send: Send, began: float) -> None:
    places = asyncio.Semaphore(load.max_in_flight) if load.max_in_flight else None

    async def one(target: int, index: int, due: float) -> None:
        if places is None:
            await send(target, index, due)
            return
        async with places:
            await send(target, index, due)

    async with asyncio.TaskGroup() as group:
        for due, target, index in _schedule(load, targets):
            if (wait := due - (perf_counter() - began)) > 0:
                await asyncio.sleep(wait)
            group.create_task(one(target, index, due))


def _schedule(load: Load, targets: int) -> Iterator[tuple[float, int, int]]:
    """(due, target, index) in the order of time."""
    assert load.rate is not None

    def of(target: int, rate: float) -> Iterator[tuple[float, int, int]]:
        for index, due in enumerate(arrivals(rate, load.seed, target)):
            if index == load.requests or (load.duration is not None and due >= load.duration):
                return
            yield due, target, index

    return heapq.merge(*(of(target, load.rate) for target in range(targets)))
