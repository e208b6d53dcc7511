"""Simulate the queue of several replicas, event by event.

The simulation predicts latencies for arrivals in bursts and answers of unequal length. Requests
arrive as a Poisson process. Each goes to the replica that the routing chooses; there it starts, or
waits in order while all `slots` are taken. With m requests in flight on a replica, each of them
completes 1 / seconds(m) of its work per second, as in the cost model. The work of a request is 1
on average. Its length is drawn from a gamma distribution with the coefficient of variation `spread`
(0: all equal, 1: exponential). A pool of judges is a second queue behind the first.

simpy does not fit: a replica is one shared server whose speed changes with every arrival and every
end, which simpy's resources do not model.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infer_align.errors import ConfigError
from infer_align.types import Array
from infer_align_bench.traffic import LOAD_BOUND, Traffic, homes

# A run simulates at least this many arrivals ...
MIN_ARRIVALS = 20_000
# ... and at least as many as arrive in this multiple of the latency on a full replica.
MIN_LATENCIES = 30
# More replicas than this are simulated as this number, each with the same load. A smaller group
# waits longer, so that the result is not too optimistic.
MAX_SIMULATED_REPLICAS = 40
# Share of the arrivals that is not counted, because the queue begins empty.
WARMUP_SHARE = 0.3
# A queue grows if its later half takes longer than its earlier half by this factor.
GROWTH = 1.3
MAX_REPLICAS = 1_000_000

Latency = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Simulated:
    """Latencies of the requests after the warm-up, in seconds from arrival to end."""

    mean: float
    p50: float
    p99: float
    # Share of requests that could not start at once.
    waited: float
    # True if latencies grow with time: then there is no steady state.
    growing: bool
    # Share of requests that were sent to another replica than that of their prefix.
    diverted: float = 0.0


@dataclass(frozen=True, slots=True)
class JudgePool:
    """Replicas that judge answers and generate none.

    Attributes:
        seconds: of one request that is judged alone; requests share a replica equally.
        replicas: number of them.
    """

    seconds: float
    replicas: int


def simulate(
    seconds: Latency,
    rate: float,
    replicas: int,
    slots: int,
    traffic: Traffic | None = None,
    *,
    judges: JudgePool | None = None,
    arrivals: int | None = None,
    seed: int = 0,
) -> Simulated:
    """Simulate the latencies at a rate.

    Args:
        seconds: latency of a request with m requests in flight on its replica.
        rate: requests per second over all replicas.
        replicas: number of replicas.
        slots: maximum number of requests in flight on a replica.
        traffic: how the work of requests differs, and where they are sent; by default the spread
            is 0.5, and the replica with the fewest requests is chosen.
        judges: that read every answer before it is returned; None: the replicas do it themselves.
        arrivals: number of simulated requests; None: enough for stable percentiles.
        seed: of arrivals and work.
    """
    traffic = traffic or Traffic()
    share = min(1.0, MAX_SIMULATED_REPLICAS / replicas)
    rate *= share
    replicas = min(replicas, MAX_SIMULATED_REPLICAS)
    if not arrivals:
        arrivals = max(MIN_ARRIVALS, math.ceil(MIN_LATENCIES * rate * seconds(slots)))
    generator = np.random.default_rng(seed)
    due = np.cumsum(generator.exponential(1 / rate, arrivals))
    lengths = traffic.lengths(generator, arrivals)
    preferred, elsewhere = traffic.works(generator, lengths)
    latencies = [math.inf, *(seconds(m) for m in range(1, slots + 1))]
    queue = _Queue(latencies, replicas, slots, preferred, elsewhere)
    chosen = homes(traffic.routing, generator, replicas, arrivals)
    for request, arrival in enumerate(due.tolist()):
        queue.run_until(arrival)
        home = queue.route(chosen[request], bounded=traffic.routing == "affine") if chosen else None
        queue.arrive(request, arrival, home)
    queue.run_until(math.inf)
    ended = np.array(queue.ended)
    if judges is not None:
        ended = _judged(judges, share, ended, lengths)
    first_counted = int(arrivals * WARMUP_SHARE)
    return _summary(ended - due, queue, first_counted)


def _summary(times: Array, queue: _Queue, first_counted: int) -> Simulated:
    times = times[first_counted:]
    half = len(times) // 2
    return Simulated(
        mean=float(times.mean()),
        p50=float(np.quantile(times, 0.5)),
        p99=float(np.quantile(times, 0.99)),
        waited=float(np.mean(np.array(queue.waited)[first_counted:])),
        growing=bool(times[half:].mean() > GROWTH * times[:half].mean()),
        diverted=queue.diverted / len(queue.ended),
    )


def _judged(judges: JudgePool, share: float, due: Array, lengths: Array) -> Array:
    """Return when each request is judged that is generated at `due`: [requests] -> [requests].

    Of a large pool the same share is simulated as of the replicas. A share that is no whole number
    is rounded up, and each replica is slower by as much.
    """
    exact = judges.replicas * share
    replicas = max(1, math.ceil(exact - 1e-9))
    alone = judges.seconds * replicas / exact
    slots = len(due)
    order = np.argsort(due, kind="stable")
    works = lengths[order]
    queue = _Queue(_Shared(alone), replicas, slots, works, works)
    for request, arrival in enumerate(due[order].tolist()):
        queue.run_until(arrival)
        queue.arrive(request, arrival)
    queue.run_until(math.inf)
    ended = np.empty_like(due)
    ended[order] = queue.ended
    return ended


class _Shared(Sequence[float]):
    """The latencies of a replica that its requests share: m of them take m times as long."""

    def __init__(self, alone: float) -> None:
        self._alone = alone

    def __len__(self) -> int:
        return MAX_REPLICAS

    def __getitem__(self, requests: Any) -> Any:
        return requests * self._alone


class _Replica:
    """One replica.

    All running requests share one clock that advances by 1 / seconds(m). A request ends when the
    clock has advanced by its work.
    """

    __slots__ = ("clock", "now", "running", "version", "waiting")

    def __init__(self) -> None:
        # The shared clock, and the time at which it was read.
        self.clock = 0.0
        self.now = 0.0
        # Heap of (clock at the end, request).
        self.running: list[tuple[float, int]] = []
        self.waiting: deque[int] = deque()
        # Increases with every change, so that older entries of the queue's heap are outdated.
        self.version = 0

    def advance(self, now: float, latencies: Sequence[float]) -> None:
        """Advance the clock to the time `now`."""
        if self.running:
            self.clock += (now - self.now) / latencies[len(self.running)]
        self.now = now

    def start(self, request: int, work: float) -> None:
        heapq.heappush(self.running, (self.clock + work, request))

    def load(self) -> int:
        return len(self.running) + len(self.waiting)

    def next_end(self, latencies: Sequence[float]) -> float:
        """Return the time at which the next running request ends if nothing changes."""
        remaining = max(0.0, self.running[0][0] - self.clock)
        return self.now + remaining * latencies[len(self.running)]


class _Queue:
    """State of the simulation."""

    def __init__(
        self,
        latencies: Sequence[float],
        replicas: int,
        slots: int,
        preferred: Array,
        elsewhere: Array,
    ) -> None:
        """Start empty; the works of a request are those on its own replica and on another."""
        self.ended = [0.0] * len(preferred)
        self.waited = [False] * len(preferred)
        self.diverted = 0
        self._latencies = latencies
        self._slots = slots
        self._work: list[float] = preferred.tolist()
        self._elsewhere: list[float] = elsewhere.tolist()
        self._present = 0
        self._replicas = [_Replica() for _ in range(replicas)]
        # Heap of (time, replica, its version); outdated where the version differs.
        self._ends: list[tuple[float, int, int]] = []
        # Heap of (load, replica); outdated where the load differs.
        self._loads = [(0, index) for index in range(replicas)]

    def run_until(self, now: float) -> None:
        """Process every end up to the time `now`."""
        while self._ends and self._ends[0][0] <= now:
            time, index, version = heapq.heappop(self._ends)
            replica = self._replicas[index]
            if version != replica.version:
                continue
            replica.advance(time, self._latencies)
            _, request = heapq.heappop(replica.running)
            self.ended[request] = time
            self._present -= 1
            if replica.waiting:
                waiting_request = replica.waiting.popleft()
                replica.start(waiting_request, self._work[waiting_request])
            self._update(index)

    def route(self, home: int, *, bounded: bool) -> int | None:
        """Return the replica of a request that prefers `home`; None for the one with the fewest.

        With `bounded`, a replica that has more than its share of requests is avoided.
        """
        if not bounded:
            return home
        mean = (self._present + 1) / len(self._replicas)
        if self._replicas[home].load() < math.ceil(LOAD_BOUND * mean):
            return home
        self.diverted += 1
        return None

    def arrive(self, request: int, now: float, home: int | None = None) -> None:
        """Send a request to a replica, or to that with the fewest requests."""
        index = home
        if index is None:
            index = self._least_loaded()
            self._work[request] = self._elsewhere[request]
        self._present += 1
        replica = self._replicas[index]
        replica.advance(now, self._latencies)
        if len(replica.running) < self._slots:
            replica.start(request, self._work[request])
        else:
            replica.waiting.append(request)
            self.waited[request] = True
        self._update(index)

    def _least_loaded(self) -> int:
        load, index = heapq.heappop(self._loads)
        while load != self._replicas[index].load():
            load, index = heapq.heappop(self._loads)
        return index

    def _update(self, index: int) -> None:
        """Put the new load and the next end of a replica into the heaps."""
        replica = self._replicas[index]
        replica.version += 1
        heapq.heappush(self._loads, (replica.load(), index))
        if replica.running:
            end = replica.next_end(self._latencies)
            heapq.heappush(self._ends, (end, index, replica.version))


def replicas_for(
    seconds: Latency,
    rate: float,
    slots: int,
    p99: float,
    traffic: Traffic | None = None,
    *,
    judges: JudgePool | None = None,
    seed: int = 0,
) -> tuple[int, Simulated]:
    """Find the smallest number of replicas that ends 99% of the requests within `p99` seconds.

    The other arguments are those of `simulate`.

    Returns:
        The number of replicas and their simulated latencies.

    Raises:
        ConfigError: no number of replicas reaches it.
    """
    seconds_per_request = min(seconds(m) / m for m in range(1, slots + 1))
    fewest = max(1, math.floor(rate * seconds_per_request))
    maximum = min(MAX_REPLICAS, 64 * fewest + 64)
    low = fewest - 1
    high = fewest
    best = simulate(seconds, rate, high, slots, traffic, judges=judges, seed=seed)
    # Double the surplus over the fewest replicas until the limit is met.
    while not _meets(best, p99):
        if high >= maximum:
            raise ConfigError(
                f"--p99: {p99:g} s is too short: a single request without other load takes "
                f"{seconds(1):.3g} s, and 99% end within {best.p99:.3g} s; raise --p99."
            )
        low = high
        high += max(1, high - fewest + 1, high // 20)
        best = simulate(seconds, rate, high, slots, traffic, judges=judges, seed=seed)
    while high - low > 1:
        middle = (low + high) // 2
        simulated = simulate(seconds, rate, middle, slots, traffic, judges=judges, seed=seed)
        if _meets(simulated, p99):
            high = middle
            best = simulated
        else:
            low = middle
    return high, best


def _meets(simulated: Simulated, p99: float) -> bool:
    return simulated.p99 <= p99 and not simulated.growing
