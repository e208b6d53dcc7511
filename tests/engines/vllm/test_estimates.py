"""The fetcher of value estimates, with workers that the test controls. Needs no vLLM."""

from __future__ import annotations

import asyncio
import itertools
from functools import partial

import pytest

from infer_align.engines.vllm.estimates import EstimateFetcher
from infer_align.engines.vllm.extra_args import Estimated, EstimateRequest
from infer_align.steering import EstimateSchedule

pytestmark = pytest.mark.anyio
# An upper bound for a slow machine; the tests wait for events, not for this time.
LIMIT_SECONDS = 30.0
Answer = list[list[Estimated]]


class Workers:
    """Workers that answer each call with the next of the prepared answers, one list per worker.

    Attributes:
        calls: number of calls that the workers received.
        checks: number of times that the fetcher read the token count of a request.
        tokens: the token count of every request.
        delivered: the estimates that requests received.
    """

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.calls = 0
        self.checks = 0
        self.tokens = 0
        self.delivered: list[Estimated] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.fetcher = EstimateFetcher(self.fetch)

    async def fetch(self) -> Answer:
        self.calls += 1
        answer = self.answers.pop(0) if self.answers else []
        await self.may_answer.wait()
        return answer

    def subscribe(self, key: str) -> None:
        request = EstimateRequest(key, EstimateSchedule({"helpful": 1.0}, 4))
        self.fetcher.add(request, self.count_tokens, partial(self.deliver, key))

    def count_tokens(self) -> int:
        self.checks += 1
        return self.tokens

    def deliver(self, key: str, tokens: int, value: float) -> None:
        self.delivered.append((key, tokens, value))

    async def generate(self, tokens: int) -> None:
        """Set the token count and wait until the fetcher has checked it several times."""
        self.tokens = tokens
        first = self.checks
        async with asyncio.timeout(LIMIT_SECONDS):
            while self.checks < first + 6:
                await asyncio.sleep(0)


async def test_estimates_are_fetched_once_when_they_are_due() -> None:
    workers = Workers(
        [[("a", 4, 0.5), ("b", 4, 0.25)], [("a", 4, 0.5)]],
        [[("a", 8, 1.5), ("b", 8, 0.1), ("c", 4, 9.0)], []],
    )
    workers.subscribe("a")
    workers.subscribe("b")
    await workers.generate(4)
    assert not workers.calls, "nothing is due"
    await workers.generate(5)
    assert workers.calls == 1
    await workers.generate(9)
    assert workers.calls == 2
    expected = [("a", 4, 0.5), ("b", 4, 0.25), ("a", 8, 1.5), ("b", 8, 0.1)]
    assert workers.delivered == expected, "each once, and none for an unknown request"


async def test_nothing_is_fetched_after_the_last_request() -> None:
    workers = Workers()
    workers.subscribe("a")
    await workers.generate(4)
    workers.fetcher.discard(["a"])
    workers.tokens = 100
    polling = workers.fetcher._polling
    assert polling is not None
    await asyncio.wait_for(polling, LIMIT_SECONDS)
    assert not workers.calls


async def test_a_flush_delivers_all_estimates_made_before_it() -> None:
    workers = Workers([], [[("a", 4, 0.5)], []])
    workers.subscribe("a")
    workers.may_answer.clear()
    running = asyncio.create_task(workers.fetcher.flush())
    async with asyncio.timeout(LIMIT_SECONDS):
        while not workers.calls:
            await asyncio.sleep(0)
    # The estimate of "a" is made now, too late for the fetch that runs.
    later = [asyncio.create_task(workers.fetcher.flush()) for _ in range(8)]
    for _ in range(3):
        await asyncio.sleep(0)
    workers.may_answer.set()
    await asyncio.wait_for(asyncio.gather(running, *later), LIMIT_SECONDS)
    assert workers.delivered == [("a", 4, 0.5)]
    assert workers.calls == 2, "flushes during a fetch share the next one"
    workers.fetcher.close()


async def test_failing_workers_do_not_block_a_flush(caplog: pytest.LogCaptureFixture) -> None:
    attempts = itertools.count()

    async def fail() -> Answer:
        next(attempts)
        raise RuntimeError("gone")

    workers = Workers()
    workers.fetcher = EstimateFetcher(fail)
    workers.subscribe("a")
    await asyncio.wait_for(workers.fetcher.flush(), LIMIT_SECONDS)
    assert next(attempts) == 1
    assert "could not be fetched" in caplog.text
