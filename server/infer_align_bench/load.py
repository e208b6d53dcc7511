"""The two loops. Closed: a new request when one ends. Open: at random times, whatever the endpoint does.

Two targets in a closed loop are asked in slices: A alone with its full concurrency until a slice of its requests has ended, then B,
the order changing from round to round. So each target bears the load that it would bear alone, both see the same weather, and a
target's time is the time of its own slices. In an open loop both get their arrivals at once: a rate is a load of its own.

In the open loop latency counts from the time at which a request was due, not from when it could be sent: an endpoint that stalls
keeps every request waiting that came meanwhile, and the percentiles must say so ("coordinated omission").
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from infer_align_bench.types import Load, Prompt, Run, Sample, Span

ROUNDS = 10  # slices of each target, where there are requests enough
FULL = 4  # times the concurrency: the fewest requests of a slice, most of which then run under the full load
SHORTEST = 1.0  # seconds of a slice, where time bounds it
GIVEN_UP = "given up"


class Sender(Protocol):
    """What `Endpoint.send` does."""

    def __call__(
        self, prompt: Prompt, index: int, began: float, intended: float | None = None
    ) -> Awaitable[Sample]:
        """One request, timed."""


def turns(index: int, count: int, seed: int) -> list[int]:
    """In which order round `index` asks its `count` targets: random, and the next the other way round, so that none leads."""
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


def slices(load: Load, targets: int) -> list[tuple[int | None, float | None]]:
    """(requests, seconds) of each target's slice, round by round; None: no bound of its own."""
    if targets == 1:
        return [(load.requests, load.duration)]
    if load.requests is None:
        assert load.duration is not None
        rounds = _even(min(ROUNDS, int(load.duration / targets / SHORTEST)))
        return [(None, load.duration / targets / rounds)] * rounds
    rounds = _even(min(ROUNDS, load.requests // (FULL * (load.concurrency or 1))))
    return [(len(part), None) for part in np.array_split(np.arange(load.requests), rounds)]


def _even(rounds: int) -> int:
    """An even number, so that each target leads as often; 1 where there are too few."""
    return max(1, rounds - rounds % 2)


async def run(
    load: Load,
    prompts: Sequence[Prompt],
    senders: Mapping[str, Sender],
    stop: asyncio.Event,
    on_sample: Callable[[Sample], None] = lambda _: None,
) -> Run:
    """Apply a load to one target, or to two, until its requests or its time are over, or `stop` is set.

    `load.duration + load.grace` seconds bound the whole: what has not ended by then becomes a sample with the error "given up".
    """
    loop = _Loop(load, prompts, senders, on_sample)
    interrupted = not await until(stop, loop.bounded())
    left = {"abandoned": loop.state["sent"], "unsent": loop.state["waiting"]} if interrupted else {}
    return Run(
        tuple(loop.samples), perf_counter() - loop.began, tuple(loop.spans), interrupted, **left
    )


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


class _Loop:
    """One run under way."""

    def __init__(
        self,
        load: Load,
        prompts: Sequence[Prompt],
        senders: Mapping[str, Sender],
        on_sample: Callable[[Sample], None],
    ) -> None:
        self.samples: list[Sample] = []
        self.spans: list[Span] = []
        self.state: Counter[str] = (
            Counter()
        )  # requests that are "sent", and those that are due and "waiting"
        self.began = perf_counter()
        self._load, self._prompts, self._senders, self._on_sample = (
            load,
            prompts,
            senders,
            on_sample,
        )
        self._names = list(senders)
        self._expired = False

    @property
    def now(self) -> float:
        return perf_counter() - self.began

    async def bounded(self) -> None:
        """The loop within its time."""
        load = self._load
        clock = asyncio.get_running_loop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None) as bound:
                if load.duration is not None:
                    at = clock.time() + load.duration + load.grace
                    bound.reschedule(at)
                    clock.call_at(at - 1e-3, self._expire)  # before the tasks hear of it
                await (self._open() if load.open else self._closed())

    def _expire(self) -> None:
        self._expired = True

    async def _send(
        self,
        name: str,
        index: int,
        due: float | None = None,
        place: asyncio.Semaphore | None = None,
    ) -> None:
        """One request, which waits for its place; however it ends, it is one sample."""
        asked, state = self.now if due is None else due, "waiting"
        self.state[state] += 1
        try:
            async with place or contextlib.nullcontext():
                self.state[state] -= 1
                state = "sent"
                self.state[state] += 1
                sample = await self._senders[name](
                    self._prompts[index % len(self._prompts)], index, self.began, due
                )
        except asyncio.CancelledError:
            if not self._expired:
                raise  # Ctrl-C: still under way, and counted as such
            message = f"no end in --duration and {self._load.grace:g} s of grace" + (
                ", and never sent" if state == "waiting" else ""
            )
            sample = Sample(
                name,
                index,
                asked,
                self.now if state == "waiting" else asked,
                self.now,
                error=GIVEN_UP,
                message=message,
            )
        self.state[state] -= 1
        self.samples.append(sample)
        self._on_sample(sample)

    async def _closed(self) -> None:
        indices = [itertools.count(self._load.first) for _ in self._names]
        for number, (requests, seconds) in enumerate(slices(self._load, len(self._names))):
            for target in turns(number, len(self._names), self._load.seed):
                await self._slice(
                    self._names[target], itertools.islice(indices[target], requests), seconds
                )

    async def _slice(self, name: str, indices: Iterator[int], seconds: float | None) -> None:
        """`concurrency` requests of one target under way until they are all sent, or the time is over; then wait for the last."""
        began = self.now
        limits = [self._load.duration, None if seconds is None else began + seconds]
        end = min((limit for limit in limits if limit is not None), default=np.inf)

        async def worker() -> None:
            # The time is looked at first: an index that is taken is asked.
            while (
                self.now < end and (index := next(indices, None)) is not None and not self._expired
            ):
                await self._send(name, index)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._load.concurrency or 1):
                    group.create_task(worker())
        finally:
            self.spans.append(Span(name, began, self.now))

    async def _open(self) -> None:
        most = self._load.max_in_flight
        places = {name: asyncio.Semaphore(most) if most else None for name in self._names}
        try:
            async with asyncio.TaskGroup() as group:
                for due, target, index in _schedule(self._load, len(self._names)):
                    if (wait := due - self.now) > 0:
                        await asyncio.sleep(wait)
                    name = self._names[target]
                    group.create_task(self._send(name, index, due, places[name]))
        finally:
            self.spans += [Span(name, 0.0, self.now) for name in self._names]


def _schedule(load: Load, targets: int) -> Iterator[tuple[float, int, int]]:
    """(due, target, index) in the order of time."""
    assert load.rate is not None

    def of(target: int, rate: float) -> Iterator[tuple[float, int, int]]:
        for count, due in enumerate(arrivals(rate, load.seed, target)):
            if count == load.requests or (load.duration is not None and due >= load.duration):
                return
            yield due, target, load.first + count

    return heapq.merge(*(of(target, load.rate) for target in range(targets)))
