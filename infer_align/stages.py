"""The stages of a request, for whoever watches them.

The flow says when a stage begins and ends, and calls to other servers ask for the headers that
continue a trace. Without a watcher both cost one look at a variable. The watcher is set by the
server, see `infer_align_server.telemetry`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Protocol, TypeAlias

# Called inside a stage with the type of the error that made it fail without an exception.
Fail: TypeAlias = Callable[[str], None]


class StageWatcher(Protocol):
    """Sees the stages of one request."""

    def stage(self, name: str, subject: str) -> AbstractContextManager[Fail]:
        """Return the block around a stage.

        Args:
            name: "plan", "draw", "reward" or "select".
            subject: the name of the reward; "" for the other stages.
        """

    def headers(self) -> Mapping[str, str]:
        """Return the headers that continue the trace in another server."""


# The watcher of the request that this task works for.
watcher: ContextVar[StageWatcher | None] = ContextVar("watcher", default=None)


def _ignore(_: str) -> None:
    """Do nothing: nobody watches."""


_UNWATCHED: AbstractContextManager[Fail] = nullcontext(_ignore)


def stage(name: str, subject: str = "") -> AbstractContextManager[Fail]:
    """Return the block around a stage of the running request; see `StageWatcher.stage`."""
    watching = watcher.get()
    return _UNWATCHED if watching is None else watching.stage(name, subject)


def trace_headers() -> Mapping[str, str]:
    """Return the headers that continue the trace of the running request; {} without a trace."""
    watching = watcher.get()
    return {} if watching is None else watching.headers()
