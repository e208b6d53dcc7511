"""A queue of replicas, event by event: how long requests take at a rate, with arrivals in bursts and answers of unequal length.

Requests come as a Poisson process. Each goes to the replica with the fewest requests; there it starts, or waits in order while all
`slots` are taken. With m under way a request makes 1 / seconds(m) of its work a second, as the cost model says; its work is 1 on
average, drawn from a gamma distribution with the coefficient of variation `spread` (0: all alike, 1: exponential).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from infer_align.errors import ConfigError

ARRIVALS = 20_000  # at least, and for so many times as long as a request takes on a full replica:
TIMES = 30
POOL = 40  # replicas: more of them are simulated as so many, each under the same load; a smaller pool waits longer, not shorter
WARMUP = 0.3  # of the arrivals, not counted: the queue begins empty
MOST_REPLICAS = 1_000_000


@dataclass(frozen=True, slots=True)
class Simulated:
    """Of the requests after the warm-up, seconds from arrival to end."""

    mean: float
    p50: float
    p99: float
    waited: float  # share of requests that could not start at once
    growing: bool  # whether the later half took markedly longer: then there is no steady state, and figures only grow


class _Replica:
    """Those under way share one clock, which runs by 1 / seconds(m): a request ends when it shows its start plus its work."""

    __slots__ = ("at", "clock", "running", "version", "waiting")

    def __init__(self) -> None:
        self.clock = self.at = 0.0
        self.running: list[tuple[float, int]] = []  # (clock at the end, request)
        self.waiting: deque[int] = deque()
        self.version = 0

    def advance(self, now: float, seconds: Sequence[float]) -> None:
        """Let the clock run until `now`."""
        if self.running:
            self.clock += (now - self.at) / seconds[len(self.running)]
        self.at = now

    def load(self) -> int:
        return len(self.running) + len(self.waiting)


def simulate(
    seconds: Callable[[int], float],
    rate: float,
    replicas: int,
    slots: int,
    spread: float = 0.5,
    *,
    arrivals: int | None = None,
    seed: int = 0,
) -> Simulated:
    """Latencies at `rate` requests per second over all replicas; seconds(m) is a request's time with m under way on its replica."""
    rate, replicas = rate * min(1.0, POOL / replicas), min(replicas, POOL)
    arrivals = arrivals or max(ARRIVALS, math.ceil(TIMES * rate * seconds(slots)))
    chance = np.random.default_rng(seed)
    due = np.cumsum(chance.exponential(1 / rate, arrivals))
    work = chance.gamma(1 / spread**2, spread**2, arrivals) if spread else np.ones(arrivals)
    queue = _Queue(
        [math.inf, *(seconds(m) for m in range(1, slots + 1))], replicas, slots, work.tolist()
    )
    for request, at in enumerate(due.tolist()):
        queue.run_until(at)
        queue.arrive(request, at)
    queue.run_until(math.inf)
    counted = slice(int(arrivals * WARMUP), None)
    times = np.array(queue.ended)[counted] - due[counted]
    half = len(times) // 2
    return Simulated(
        mean=float(times.mean()),
        p50=float(np.quantile(times, 0.5)),
        p99=float(np.quantile(times, 0.99)),
        waited=float(np.mean(np.array(queue.waited)[counted])),
        growing=bool(times[half:].mean() > 1.3 * times[:half].mean()),
    )


class _Queue:
    """The state of the simulation."""

    def __init__(
        self, seconds: Sequence[float], replicas: int, slots: int, work: Sequence[float]
    ) -> None:
        self.ended, self.waited = [0.0] * len(work), [False] * len(work)
        self._seconds, self._slots, self._work = seconds, slots, work
        self._replicas = [_Replica() for _ in range(replicas)]
        self._ends: list[
            tuple[float, int, int]
        ] = []  # (time, replica, its version): stale where the version is
        self._least = [(0, i) for i in range(replicas)]  # (load, replica): stale where the load is

    def run_until(self, now: float) -> None:
        """Let everything end that ends by `now`."""
        while self._ends and self._ends[0][0] <= now:
            at, index, version = heapq.heappop(self._ends)
            replica = self._replicas[index]
            if version != replica.version:
                continue
            replica.advance(at, self._seconds)
            self.ended[heapq.heappop(replica.running)[1]] = at
            if replica.waiting:
                self._start(replica, replica.waiting.popleft())
            self._changed(index)

    def arrive(self, request: int, now: float) -> None:
        """Send it to the replica with the fewest requests."""
        while True:
            load, index = heapq.heappop(self._least)
            if load == self._replicas[index].load():
                break
        replica = self._replicas[index]
        replica.advance(now, self._seconds)
        if len(replica.running) < self._slots:
            self._start(replica, request)
        else:
            replica.waiting.append(request)
            self.waited[request] = True
        self._changed(index)

    def _start(self, replica: _Replica, request: int) -> None:
        heapq.heappush(replica.running, (replica.clock + self._work[request], request))

    def _changed(self, index: int) -> None:
        replica = self._replicas[index]
        replica.version += 1
        heapq.heappush(self._least, (replica.load(), index))
        if replica.running:
            left = (
                max(0.0, replica.running[0][0] - replica.clock)
                * self._seconds[len(replica.running)]
            )
            heapq.heappush(self._ends, (replica.at + left, index, replica.version))


def replicas_for(
    seconds: Callable[[int], float],
    rate: float,
    slots: int,
    p99: float,
    spread: float = 0.5,
    *,
    seed: int = 0,
) -> tuple[int, Simulated]:
    """The fewest replicas that end 99% of requests within `p99` seconds, and what they then take.

    Raises:
        ConfigError: one request alone takes longer.
    """
    fewest = max(1, math.floor(rate * min(seconds(m) / m for m in range(1, slots + 1))))
    low, high = fewest - 1, fewest
    while not _keeps(found := simulate(seconds, rate, high, slots, spread, seed=seed), p99):
        if high >= min(MOST_REPLICAS, 64 * fewest + 64):
            raise ConfigError(
                f"--p99: {p99:g} s cannot be kept: alone a request takes {seconds(1):.3g} s, the longest {found.p99:.3g} s."
            )
        low, high = high, high + max(1, (high - fewest + 1), high // 20)
    best = found
    while high - low > 1:
        middle = (low + high) // 2
        found = simulate(seconds, rate, middle, slots, spread, seed=seed)
        if _keeps(found, p99):
            high, best = middle, found
        else:
            low = middle
    return high, best


def _keeps(found: Simulated, p99: float) -> bool:
    return found.p99 <= p99 and not found.growing
