"""Choice of the host for the next call: the least loaded one that is up and has a free place."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from time import monotonic

from infer_align.errors import Unavailable
from infer_align.upstream import Address

log = logging.getLogger("infer_align")

# After this many consecutive failures of a host, the others are preferred for a while.
SUSPECT_FAILURES = 3
SUSPECT_SECONDS = 10.0


@dataclass(slots=True, eq=False)
class Host:
    """One upstream and its last known state.

    Attributes:
        url: base URL.
        weight: share of the load, relative to the other hosts.
        recovery_seconds: interval between attempts to reach it while it is down.
        running: calls that are running now.
        down_reason: why it cannot be reached; None while it is up.
        models: the models that it lists; None if unknown, which counts as any model.
        retry_at: when a host that is down may get a call again.
        failures: consecutive failures.
        suspect_until: until when other hosts are preferred.
        on_recovery: called when it can be reached again.
    """

    url: str
    weight: float
    recovery_seconds: float = 2.0
    running: int = 0
    down_reason: str | None = "was not reached yet"
    models: frozenset[str] | None = None
    retry_at: float = 0.0
    failures: int = 0
    suspect_until: float = 0.0
    on_recovery: Callable[[], None] = lambda: None

    def record_failure(self, unreachable: str | None = None) -> None:
        """Record a failed call; `unreachable` is the reason if there was no connection."""
        self.failures += 1
        if unreachable:
            # It becomes a part of longer sentences.
            unreachable = unreachable.removesuffix(".")
            if unreachable != self.down_reason:
                log.warning("upstream %s: %s", self.url, unreachable)
            self.down_reason = unreachable
            # Calls come back later than the regular check of the models, which costs nothing.
            self.retry_at = monotonic() + 2 * self.recovery_seconds
        if self.failures >= SUSPECT_FAILURES:
            self.suspect_until = monotonic() + SUSPECT_SECONDS

    def record_success(self) -> None:
        """Record that it answered."""
        was_down = self.down_reason is not None
        self.down_reason = None
        self.failures = 0
        self.suspect_until = 0.0
        if was_down:
            self.on_recovery()


@dataclass(slots=True, eq=False)
class _Waiter:
    """A call that waits for a free place; `host` is resolved with a place already reserved."""

    model: str | None
    host: asyncio.Future[Host] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def has_host(self) -> bool:
        """Return True if a place is reserved for this waiter."""
        return self.host.done() and not self.host.cancelled() and self.host.exception() is None


class Pool:
    """The hosts of one section, and the calls that wait for a free place.

    Args:
        addresses: the hosts.
        max_concurrency: maximum number of concurrent calls to each host.
        recovery_seconds: interval between attempts to reach a host that is down.
    """

    def __init__(
        self, addresses: Sequence[Address], max_concurrency: int, recovery_seconds: float = 2.0
    ) -> None:
        self.hosts = [Host(address.url, address.weight, recovery_seconds) for address in addresses]
        self._max_concurrency = max_concurrency
        self._waiters: deque[_Waiter] = deque()
        for host in self.hosts:
            host.on_recovery = self.wake

    def health(self) -> str | None:
        """Return None if a host can be reached, else the reason for each host.

        The reasons do not name the URLs: those are for the log, not for clients.
        """
        reasons: list[str] = []
        for number, host in enumerate(self.hosts, 1):
            if host.down_reason is None:
                return None
            reasons.append(f"upstream {number}: {host.down_reason}")
        return "; ".join(reasons)

    def serving(self, model: str | None) -> list[Host]:
        """Return the hosts that serve a model and may get a call.

        These are the hosts that are up, and those that have been down long enough to be tried
        again. If there are none, all hosts that serve the model are returned.
        """
        hosts = []
        for host in self.hosts:
            if model is None or host.models is None or model in host.models:
                hosts.append(host)
        now = monotonic()
        usable = [host for host in hosts if host.down_reason is None or host.retry_at <= now]
        return usable or hosts

    async def acquire(self, model: str | None, avoid: Collection[Host] = ()) -> Host:
        """Reserve a place on a host for one call; give it back with `release`.

        Args:
            model: the model that the host must serve; None for any host.
            avoid: hosts that just failed, chosen only if there is no other.

        Raises:
            Unavailable: no host serves the model.
        """
        host = self._free_host(model, avoid)
        if host is not None:
            host.running += 1
            return host
        if not self.serving(model):
            raise _no_host(model)
        waiter = _Waiter(model)
        self._waiters.append(waiter)
        try:
            return await waiter.host
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            elif waiter.has_host():
                # The place was reserved in the moment of the cancellation: pass it on.
                self.release(waiter.host.result())
            raise

    def release(self, host: Host) -> None:
        """Give back the place of a call that has ended."""
        host.running -= 1
        self.wake()

    def wake(self) -> None:
        """Wake waiters after a change.

        Each waiter gets a free host, or the error Unavailable if no host serves its model any more.
        """
        for waiter in tuple(self._waiters):
            served = bool(self.serving(waiter.model))
            host = self._free_host(waiter.model)
            if served and host is None:
                continue
            self._waiters.remove(waiter)
            if waiter.host.cancelled():
                continue
            if host is None:
                waiter.host.set_exception(_no_host(waiter.model))
            else:
                host.running += 1
                waiter.host.set_result(host)

    def _free_host(self, model: str | None, avoid: Collection[Host] = ()) -> Host | None:
        """Return the best host with a free place, or None if every host is full."""
        now = monotonic()

        def rank(host: Host) -> tuple[bool, bool, float]:
            load = (host.running + 1) / host.weight
            return host in avoid, host.suspect_until > now, load

        free = [host for host in self.serving(model) if host.running < self._max_concurrency]
        return min(free, key=rank, default=None)


def _no_host(model: str | None) -> Unavailable:
    return Unavailable(f"no upstream has the model {model!r}; try again later.", retry_after=5)
