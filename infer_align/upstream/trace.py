"""The ids by which one request and the calls that it makes are found in the logs of all servers."""

from __future__ import annotations

from contextvars import ContextVar

HEADER = "x-request-id"
# An upstream's own ids that are kept per request, and their length.
MAX_IDS = 32
MAX_LENGTH = 128


class CallTrace:
    """The calls to upstreams that one request makes.

    Attributes:
        request_id: the id of the request.
        upstream_ids: the ids that upstreams gave to its calls, in order.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.upstream_ids: list[str] = []
        self._calls = 0

    def next_id(self) -> str:
        """Return the id of the next call. No two calls have the same: some servers refuse that."""
        self._calls += 1
        return f"{self.request_id}.{self._calls}"

    def note(self, sent: str, received: str | None) -> None:
        """Keep the id in an upstream's answer, if it is not the one that was sent to it."""
        if received and received != sent and len(self.upstream_ids) < MAX_IDS:
            self.upstream_ids.append(received[:MAX_LENGTH])


# The trace of the request that is handled now; None outside of requests.
trace: ContextVar[CallTrace | None] = ContextVar("trace", default=None)
