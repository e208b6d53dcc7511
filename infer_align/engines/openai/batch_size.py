"""Number of candidates that one call may request, learned per upstream and model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import monotonic
from typing import Literal, TypeAlias

from infer_align.upstream.pool import Host

Mode = Literal["auto", "native", "single"]
# A URL and a model.
HostModel: TypeAlias = tuple[str, str]
# An upstream that returned fewer choices than requested is asked for more again after this time.
FORGET_SECONDS = 300.0


class BatchSizes:
    """The numbers of choices that the upstreams return for one call, learned from their answers.

    A refusal teaches nothing: the next request may be one that the upstream accepts.

    Args:
        mode: "native" requests all candidates with one call, "single" one per call. "auto"
            starts like "native" and adapts to the number of choices that came back.

    Attributes:
        models_without_usage: models whose upstream rejects `stream_options`.
    """

    def __init__(self, mode: Mode) -> None:
        self.models_without_usage: set[str] = set()
        self._mode = mode
        # The number of choices of a call that returned fewer than requested, and
        # the time until which this limit counts.
        self._limits: dict[HostModel, tuple[int, float]] = {}
        # The largest number of choices that a call requested and got.
        self._confirmed: dict[HostModel, int] = {}

    @property
    def may_refuse_because_of_n(self) -> bool:
        """Return True if a refused call for several candidates may work for fewer."""
        return self._mode == "auto"

    def limit(self, hosts: Sequence[Host], model: str, n: int) -> int:
        """Return how many of `n` candidates one call may request from any of the hosts."""
        if self._mode == "native":
            return n
        if self._mode == "single":
            return 1
        now = monotonic()
        size = n
        for host in hosts:
            limit, until = self._limits.get((host.url, model), (n, 0.0))
            if until > now:
                size = min(size, limit)
        return size

    def learn(self, host: Host, model: str, requested: int, received: int) -> None:
        """Record how many choices a call requested and how many it returned."""
        key = host.url, model
        if received < requested:
            self._limits[key] = max(1, received), monotonic() + FORGET_SECONDS
            return
        self._confirmed[key] = max(requested, self._confirmed.get(key, 1))
        limit, _ = self._limits.get(key, (requested, 0.0))
        if requested > limit:
            del self._limits[key]

    def set_probed(self, host: Host, model: str, *, honours_n: bool) -> None:
        """Record the result of a probe for the parameter `n`."""
        key = host.url, model
        self._limits.pop(key, None)
        if honours_n:
            self.learn(host, model, 2, 2)
        else:
            self._limits[key] = 1, math.inf

    def after_refusal(self, hosts: Sequence[Host], model: str, refused: int) -> int:
        """Return the batch size after a call for `refused` candidates was refused, but not for one.

        Half of it if smaller batches are known to work. One if nothing is known, or if this size
        worked before, so that the number was not the reason.
        """
        confirmed = [self._confirmed.get((host.url, model), 1) for host in hosts]
        if 1 < max(confirmed, default=1) < refused:
            return refused // 2
        return 1
