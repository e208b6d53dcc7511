"""Which upstream takes the next call: the least loaded that is up, and has room."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from time import monotonic

from infer_align.errors import Unavailable
from infer_align.upstream import Address

log = logging.getLogger("infer_align")

# After so many failures in a row another host is preferred, for so many seconds.
AILING_FAILURES = 3
AILING_SECONDS = 10.0


@dataclass(slots=True, eq=False)
class Host:
    """One upstream, as it was last seen."""

    url: str
    weight: float
    recovery_seconds: float = 2.0
    running: int = 0
    down: str | None = "was not reached yet"  # why it cannot be reached
    models: frozenset[str] | None = None  # what it lists; None: not known, so it may have any
    try_again: float = 0.0  # when one that is down may be asked all the same, unless somebody looks after it before
    failures: int = 0  # in a row
    ailing_until: float = 0.0
    recovered: Callable[[], None] = lambda: None

    def failed(self, unreachable: str | None = None) -> None:
        """A call to it failed; `unreachable` says why there was no connection."""
        self.failures += 1
        if unreachable:
            if unreachable != self.down:
                log.warning("upstream %s: %s", self.url, unreachable)
            self.down, self.try_again = unreachable, monotonic() + 2 * self.recovery_seconds
        if self.failures >= AILING_FAILURES:
            self.ailing_until = monotonic() + AILING_SECONDS

    def answered(self) -> None:
        """It is well."""
        was_down = self.down is not None
        self.down, self.failures, self.ailing_until = None, 0, 0.0
        if was_down:
            self.recovered()


@dataclass(slots=True, eq=False)
class _Waiter:
    model: str | None
    turn: asyncio.Future[Host] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Pool:
    """Hosts, and those that wait for room on one."""

    def __init__(
        self, addresses: Sequence[Address], max_concurrency: int, recovery_seconds: float = 2.0
    ) -> None:
        self.hosts = [Host(address.url, address.weight, recovery_seconds) for address in addresses]
        self._limit = max_concurrency
        self._waiting: list[_Waiter] = []
        for host in self.hosts:
            host.recovered = self.wake

    def up(self) -> list[Host]:
        """Those that were reached when last tried."""
        return [host for host in self.hosts if host.down is None]

    def health(self) -> str | None:
        """None while at least one can be reached, else why none can; where they are is for the log, not for whoever asks."""
        if self.up():
            return None
        return "; ".join(f"upstream {i}: {host.down}" for i, host in enumerate(self.hosts, 1))

    def having(self, model: str | None) -> list[Host]:
        """Hosts that serve a model and are up, or were down long enough to be tried again; where there are none, the others."""
        able = [
            host
            for host in self.hosts
            if model is None or host.models is None or model in host.models
        ]
        now = monotonic()
        return [host for host in able if host.down is None or host.try_again <= now] or able

    async def acquire(self, model: str | None, avoid: Collection[Host] = ()) -> Host:
        """The host for the next call; give it back by `release`.

        Args:
            model: only hosts that have it.
            avoid: hosts that just failed: taken only where there is no other.

        Raises:
            Unavailable: no host has the model.
        """
        if host := self._free(model, avoid):
            host.running += 1
            return host
        if not self.having(model):
            raise _nobody(model)
        waiter = _Waiter(model)
        self._waiting.append(waiter)
        try:
            return await waiter.turn
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif (
                waiter.turn.done() and not waiter.turn.cancelled() and not waiter.turn.exception()
            ):  # its turn came as it left: pass it on
                self.release(waiter.turn.result())
            raise

    def release(self, host: Host) -> None:
        """A call to it has ended."""
        host.running -= 1
        self.wake()

    def wake(self) -> None:
        """Something has changed: whoever waits and can go now goes, whoever waits for what nobody has any more is told so."""
        for waiter in tuple(self._waiting):
            gone = not self.having(waiter.model)
            free = None if gone else self._free(waiter.model)
            if not gone and free is None:
                continue
            self._waiting.remove(waiter)
            if waiter.turn.cancelled():
                continue
            if free is None:
                waiter.turn.set_exception(_nobody(waiter.model))
            else:
                free.running += 1
                waiter.turn.set_result(free)

    def _free(self, model: str | None, avoid: Collection[Host] = ()) -> Host | None:
        able = [host for host in self.having(model) if host.running < self._limit]
        if not able:
            return None
        if len(able) == 1:
            return able[0]
        now = monotonic()
        return min(
            able,
            key=lambda host: (
                host in avoid,
                host.ailing_until > now,
                (host.running + 1) / host.weight,
            ),
        )


def _nobody(model: str | None) -> Unavailable:
    return Unavailable(f"no upstream has the model {model!r}; try again later.", retry_after=5)
