"""The queue in front of what an engine prepares for a request, such as a grammar to compile.

The worst case of a request is known only once its grammar has been compiled, so this queue comes
before admission. It is as fair: a caller with many slow grammars waits for its own.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from time import monotonic

from infer_align.config import Limits
from infer_align.engines import Engine
from infer_align.errors import DeadlineExceeded
from infer_align.types import Body, Kind
from infer_align_server.limits.admission import Admission


class Preparing:
    """Lets an engine prepare one request at a time.

    As many requests may wait here as may run and wait behind it. One whose client leaves, or whose
    deadline passes, leaves the queue.
    """

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine = engine
        waiting = limits.max_running + limits.max_queue - 1
        one_at_a_time = replace(limits, max_running=1, max_queue=waiting)
        self._queue = Admission(one_at_a_time, stage="being prepared")

    @property
    def running(self) -> int:
        """Return the number of requests that are prepared now: 0 or 1."""
        return self._queue.running

    @property
    def queued(self) -> int:
        """Return the number of requests that wait to be prepared."""
        return self._queue.queued

    async def prepare(
        self, body: Body, kind: Kind, caller: str, deadline_seconds: float | None
    ) -> float:
        """Prepare a request, once it is its turn; return the seconds that it took.

        Raises:
            Overloaded: The queue is full.
            DeadlineExceeded: The request was not prepared in time.
        """
        if self._engine.is_prepared(body, kind):
            return 0.0
        start = monotonic()
        clock = asyncio.timeout(deadline_seconds)
        try:
            async with clock, self._queue.admit(1, caller=caller):
                await self._engine.prepare(body, kind)
        except TimeoutError:
            if not clock.expired():
                # It is a failure of the engine itself.
                raise
            raise DeadlineExceeded(
                f"The grammars of the request were not compiled within its {deadline_seconds:g} s; "
                "allow more time."
            ) from None
        return monotonic() - start
