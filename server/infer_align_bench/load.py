"""Apply a load to one target or to two: a closed loop or an open loop.

A closed loop keeps a number of requests in flight: a new request starts when one ends. An open
loop sends requests at random times, independent of the answers.

In a closed loop, two targets get slices: target A alone at full concurrency until a slice of its
requests has ended, then target B. The order changes from round to round. So each target bears the
load that it would bear alone, both meet the same conditions of the machine, and the time of a
target is the time of its own slices. In an open loop both targets get their arrivals at the same
time, since a rate is a load of its own.

In an open loop, latency counts from the time at which a request was due, not from the time at
which it was sent. An endpoint that stalls also delays the requests that become due meanwhile, and
the percentiles must show that ("coordinated omission").
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from infer_align_bench.types import ChatPrompt, Load, Run, Sample, Span

# Slices of each target, if there are enough requests.
ROUNDS = 10
# A slice has at least this many requests per request in flight, so that most of its requests run
# at full load.
MIN_REQUESTS_PER_PLACE = 4
# Shortest slice of a run that is bounded by time.
MIN_SLICE_SECONDS = 1.0
# The clock expires slightly before the timeout cancels the requests, so that they see it.
EXPIRY_MARGIN_SECONDS = 1e-3
GIVEN_UP = "given up"


class Sender(Protocol):
    """Sends one request; `Endpoint.send` is the implementation over HTTP."""

    def __call__(
        self, prompt: ChatPrompt, index: int, began: float, intended: float | None = None
    ) -> Awaitable[Sample]:
        """Send one request and return its timed sample."""


def target_order(round_index: int, targets: int, seed: int) -> list[int]:
    """Return the order of the targets in a round.

    The order of an even round is random and the next round reverses it, so that each target leads
    equally often.
    """
    generator = random.Random(f"{seed}/{round_index // 2}")  # noqa: S311 - an order, no secret
    swap = generator.random() < 0.5
    order = list(range(targets))
    if swap != bool(round_index % 2):
        order.reverse()
    return order


def arrivals(rate: float, seed: int, target: int) -> Iterator[float]:
    """Yield the times of an endless Poisson process in seconds; each target has its own."""
    generator = np.random.default_rng([seed, target])
    now = 0.0
    while True:
        now += float(generator.exponential(1 / rate))
        yield now


def slices(load: Load, targets: int) -> list[tuple[int | None, float | None]]:
    """Return the number of requests and the seconds of one target's slice, for each round.

    A number of requests is meant for each target, and is split over the rounds. A duration is meant
    for the whole run, and is split over the targets too. None is no bound of its own.

    Raises:
        ValueError: there are two targets, and the load has no bound.
    """
    if targets == 1:
        return [(load.requests, load.duration)]
    if load.requests is not None:
        smallest_slice = MIN_REQUESTS_PER_PLACE * (load.concurrency or 1)
        rounds = _even(min(ROUNDS, load.requests // smallest_slice))
        parts = np.array_split(np.arange(load.requests), rounds)
        return [(len(part), None) for part in parts]
    if load.duration is None:
        raise ValueError("a load on two targets needs a number of requests or a duration.")
    seconds = load.duration / targets
    rounds = _even(min(ROUNDS, int(seconds / MIN_SLICE_SECONDS)))
    return [(None, seconds / rounds)] * rounds


def _even(rounds: int) -> int:
    """Round down to an even number, so that each target leads equally often; at least 1."""
    return max(1, rounds - rounds % 2)


async def apply_load(
    load: Load,
    prompts: Sequence[ChatPrompt],
    senders: Mapping[str, Sender],
    stop: asyncio.Event,
    on_sample: Callable[[Sample], None] = lambda _: None,
    clock: Callable[[], float] = perf_counter,
) -> Run:
    """Send requests to one or two targets until their number or the time is reached.

    A run with a duration ends after `load.duration + load.grace` seconds at the latest. Requests
    that have not ended by then become samples with the error "given up".

    Args:
        load: number, rate and time of the requests.
        prompts: used in turn.
        senders: of each target, by its name.
        stop: ends the run early when it is set.
        on_sample: called for every sample.
        clock: of the run, in seconds; the senders must use the same clock.
    """
    generator = _LoadGenerator(load, prompts, senders, on_sample, clock)
    finished = await run_until_stopped(stop, generator.run())
    return Run(
        samples=tuple(generator.samples),
        seconds=generator.now,
        spans=tuple(generator.spans),
        interrupted=not finished,
        abandoned=0 if finished else generator.in_flight,
        unsent=0 if finished else generator.waiting,
    )


async def run_until_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Run `work` to its end, or cancel it when `stop` is set.

    Returns:
        True if the work ended by itself.

    Raises:
        Exception: the first error of the work.
    """
    task = asyncio.ensure_future(work)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finished = task.done()
    finally:
        stopped.cancel()
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
    return finished


class _LoadGenerator:
    """One run in progress."""

    def __init__(
        self,
        load: Load,
        prompts: Sequence[ChatPrompt],
        senders: Mapping[str, Sender],
        on_sample: Callable[[Sample], None],
        clock: Callable[[], float],
    ) -> None:
        self.samples: list[Sample] = []
        self.spans: list[Span] = []
        self.in_flight = 0
        # Requests that are due and wait for a place.
        self.waiting = 0
        self._clock = clock
        self._began = clock()
        self._load = load
        self._prompts = prompts
        self._senders = senders
        self._on_sample = on_sample
        self._names = list(senders)
        self._expired = False

    @property
    def now(self) -> float:
        """Return the seconds since the start of the run."""
        return self._clock() - self._began

    async def run(self) -> None:
        """Run the loop, within the time of the load."""
        load = self._load
        loop = asyncio.get_running_loop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None) as timeout:
                if load.duration is not None:
                    end = loop.time() + load.duration + load.grace
                    timeout.reschedule(end)
                    loop.call_at(end - EXPIRY_MARGIN_SECONDS, self._expire)
                if load.rate is None:
                    await self._closed_loop()
                else:
                    await self._open_loop(load.rate)

    def _expire(self) -> None:
        self._expired = True

    async def _send(
        self,
        name: str,
        index: int,
        due: float | None = None,
        places: asyncio.Semaphore | None = None,
    ) -> None:
        """Send one request as soon as there is a place; any outcome is one sample."""
        intended = self.now if due is None else due
        prompt = self._prompts[index % len(self._prompts)]
        sent = False
        self.waiting += 1
        try:
            async with places or contextlib.nullcontext():
                sent = True
                self.waiting -= 1
                self.in_flight += 1
                sample = await self._senders[name](prompt, index, self._began, due)
        except asyncio.CancelledError:
            # An interrupt: the request counts as in flight or waiting.
            if not self._expired:
                raise
            sample = self._given_up(name, index, intended, sent=sent)
        if sent:
            self.in_flight -= 1
        else:
            self.waiting -= 1
        self.samples.append(sample)
        self._on_sample(sample)

    def _given_up(self, name: str, index: int, intended: float, *, sent: bool) -> Sample:
        """Return the sample of a request that did not end within the time of the load."""
        message = f"not finished within --duration plus {self._load.grace:g} s of grace"
        if not sent:
            message += "; it was never sent"
        ended = self.now
        started = intended if sent else ended
        return Sample(name, index, intended, started, ended, error=GIVEN_UP, message=message)

    async def _closed_loop(self) -> None:
        indices = [itertools.count(self._load.first) for _ in self._names]
        for number, (requests, seconds) in enumerate(slices(self._load, len(self._names))):
            for target in target_order(number, len(self._names), self._load.seed):
                part = itertools.islice(indices[target], requests)
                await self._slice(self._names[target], part, seconds)

    async def _slice(self, name: str, indices: Iterator[int], seconds: float | None) -> None:
        """Send requests to one target until they are all sent or the time is over.

        Then wait for those in flight.
        """
        began = self.now
        end = np.inf
        if self._load.duration is not None:
            end = self._load.duration
        if seconds is not None:
            end = min(end, began + seconds)

        async def worker() -> None:
            # Check the time before taking an index: an index that is taken must be sent.
            while self.now < end:
                index = next(indices, None)
                if index is None or self._expired:
                    return
                await self._send(name, index)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._load.concurrency or 1):
                    group.create_task(worker())
        finally:
            self.spans.append(Span(name, began, self.now))

    async def _open_loop(self, rate: float) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                await self._start_when_due(rate, group)
        finally:
            self.spans += [Span(name, 0.0, self.now) for name in self._names]

    async def _start_when_due(self, rate: float, group: asyncio.TaskGroup) -> None:
        """Start each request of an open loop at its time, as a task of the group."""
        limit = self._load.max_in_flight
        places = {name: asyncio.Semaphore(limit) if limit else None for name in self._names}
        for due, target, index in _schedule(self._load, rate, len(self._names)):
            delay = due - self.now
            if delay > 0:
                await asyncio.sleep(delay)
            name = self._names[target]
            group.create_task(self._send(name, index, due, places[name]))


def _schedule(load: Load, rate: float, targets: int) -> Iterator[tuple[float, int, int]]:
    """Yield due time, target and index of each request of an open loop, in the order of time."""
    schedules = [_target_schedule(load, rate, target) for target in range(targets)]
    return heapq.merge(*schedules)


def _target_schedule(load: Load, rate: float, target: int) -> Iterator[tuple[float, int, int]]:
    for count, due in enumerate(arrivals(rate, load.seed, target)):
        if count == load.requests:
            return
        if load.duration is not None and due >= load.duration:
            return
        yield due, target, load.first + count
