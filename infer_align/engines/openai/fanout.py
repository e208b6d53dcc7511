"""How many choices one call of an upstream gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import monotonic

from infer_align.upstream.pool import Host

# How long it is remembered that an upstream gave fewer choices than it was asked for.
FORGET_SECONDS = 300.0


class Fanout:
    """How many choices one call gives, by upstream and model, as answers show it; a refusal shows nothing but that request's fault.

    Args:
        mode: "native" always asks for all in one call, "single" never; "auto" asks, and remembers what came back.

    Attributes:
        unmetered: models whose upstream does not take `stream_options`.
    """

    def __init__(self, mode: str) -> None:
        self.unmetered: set[str] = set()
        self._mode = mode
        self._most: dict[
            tuple[str, str], tuple[int, float]
        ] = {}  # fewer than were asked for, and until when that counts
        self._honoured: dict[tuple[str, str], int] = {}  # the largest number that was given

    def most(self, hosts: Sequence[Host], model: str, n: int) -> int:
        """How many of n to ask one call for, whichever of the hosts will take it."""
        if self._mode != "auto":
            return n if self._mode == "native" else 1
        now = monotonic()
        known = [self._most.get((host.url, model), (n, 0.0)) for host in hosts]
        return min([n, *(most for most, until in known if until > now)])

    def learn(self, host: Host, model: str, asked: int, got: int) -> None:
        """A call for so many choices gave `got`."""
        if got < asked:
            self._most[host.url, model] = max(1, got), monotonic() + FORGET_SECONDS
            return
        self._honoured[host.url, model] = max(asked, self._honoured.get((host.url, model), 1))
        if asked > self._most.get((host.url, model), (asked, 0.0))[0]:
            del self._most[host.url, model]

    def settle(self, host: Host, model: str, *, honours: bool) -> None:
        """A probe of its own has found out whether n means anything there."""
        self._most.pop((host.url, model), None)
        if honours:
            self.learn(host, model, 2, 2)
        else:
            self._most[host.url, model] = 1, math.inf

    def chunk(self, hosts: Sequence[Host], model: str, refused: int) -> int:
        """How many to ask for after so many were refused, and one was taken: half, where fewer are known to be given. One by one
        where that many were given before, as then it is not their number; and where nothing is known.
        """
        most = max((self._honoured.get((host.url, model), 1) for host in hosts), default=1)
        return refused // 2 if 1 < most < refused else 1

    @property
    def doubtful(self) -> bool:
        """Whether a refused call for several may have been refused for their number."""
        return self._mode == "auto"
