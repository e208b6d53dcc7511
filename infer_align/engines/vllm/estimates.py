"""Value estimates of running requests, as the server fetches them from vLLM's workers.

A worker estimates the requests that are due, from the hidden states and logits of the step, and
keeps the results (recorder.py). vLLM has no channel to send them, so the server calls the workers
while requests need estimates. One call serves all requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from infer_align.engines.vllm.extra_args import Estimated, EstimateRequest

log = logging.getLogger("infer_align")

# Pause between two checks: about one step of a large model, and a few steps of a small one.
CHECK_SECONDS = 0.02
# A dead engine does not answer calls.
FETCH_TIMEOUT_SECONDS = 10.0

OnEstimate = Callable[[int, float], None]
TokenCount = Callable[[], int]


@dataclass(slots=True, eq=False)
class _Subscriber:
    """A request that needs estimates.

    Attributes:
        on_estimate: called with the tokens and the value of each estimate.
        token_count: returns how many tokens the request has.
        next_due: number of tokens at which the next estimate is due.
    """

    on_estimate: OnEstimate
    token_count: TokenCount
    next_due: int

    @property
    def is_due(self) -> bool:
        # A worker estimates in the step after the due token, when it samples another one.
        return self.token_count() > self.next_due

    def deliver(self, tokens: int, value: float) -> None:
        self.next_due = max(self.next_due, 2 * tokens)
        self.on_estimate(tokens, value)


class EstimateFetcher:
    """Fetches estimates from the workers when some are due, and delivers them to the requests.

    A call to the workers waits for the step that runs, and with several GPUs for the queued ones.
    So no call is made while nothing is due.
    """

    def __init__(self, fetch: Callable[[], Awaitable[list[list[Estimated]]]]) -> None:
        """Take the function that fetches the new estimates of every worker."""
        self._fetch = fetch
        self._subscribers: dict[str, _Subscriber] = {}
        self._polling: asyncio.Task[None] | None = None
        self._latest_fetch: asyncio.Task[None] | None = None

    def add(
        self, request: EstimateRequest, token_count: TokenCount, on_estimate: OnEstimate
    ) -> None:
        """Call `on_estimate` with the tokens and the value of each estimate of a request."""
        self._subscribers[request.key] = _Subscriber(
            on_estimate, token_count, request.schedule.after
        )
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll())

    def discard(self, keys: Iterable[str]) -> None:
        """Forget requests that have ended."""
        for key in keys:
            self._subscribers.pop(key, None)

    async def flush(self) -> None:
        """Deliver all estimates that workers have made until now.

        Callers that arrive during a fetch share the next one.
        """
        running = self._latest_fetch
        if running is not None and not running.done():
            await asyncio.wait({running})
        # The first caller that wakes up starts the next fetch.
        latest = self._latest_fetch
        if latest is None or latest is running:
            latest = asyncio.create_task(self._deliver())
            self._latest_fetch = latest
        await asyncio.wait({latest})

    def close(self) -> None:
        """Stop fetching."""
        self._subscribers.clear()
        for task in (self._polling, self._latest_fetch):
            if task is not None:
                task.cancel()

    async def _poll(self) -> None:
        while self._subscribers:
            await asyncio.sleep(CHECK_SECONDS)
            if any(subscriber.is_due for subscriber in self._subscribers.values()):
                await self.flush()

    async def _deliver(self) -> None:
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_SECONDS):
                workers = await self._fetch()
        except Exception:
            # The engine has died, and its requests report that. Without estimates no candidate
            # is stopped early.
            log.exception("value estimates could not be fetched")
            self._subscribers.clear()
            return
        # Workers that sample the same rows report the same estimates.
        unique: dict[tuple[str, int], float] = {}
        for estimates in workers:
            for key, tokens, value in estimates:
                unique[key, tokens] = value
        for (key, tokens), value in unique.items():
            subscriber = self._subscribers.get(key)
            if subscriber is not None:
                subscriber.deliver(tokens, value)
