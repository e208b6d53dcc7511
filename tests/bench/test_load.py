"""The loops: what is sent, in which order, and from when its latency counts."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align_bench.load import arrivals, run, turns
from infer_align_bench.types import Load, Prompt, Run, Sample

pytestmark = pytest.mark.anyio
PROMPTS = [Prompt(({"role": "user", "content": str(i)},)) for i in range(3)]


@dataclass
class Sender:
    """Takes `seconds` for a request, and keeps what came and how many at once."""

    name: str
    log: list[tuple[str, int, str]]
    seconds: float = 0.0
    running: int = 0
    most: list[int] = field(default_factory=lambda: [0])

    async def __call__(self, prompt: Prompt, index: int, began: float, intended: float | None = None) -> Sample:
        del began
        self.log.append((self.name, index, prompt.messages[0]["content"]))
        self.running += 1
        self.most[0] = max(self.most[0], self.running)
        await asyncio.sleep(self.seconds)
        self.running -= 1
        return Sample(self.name, index, intended or 0.0, 0.0, self.seconds)


async def apply(
    load: Load, *seconds: float, stop: asyncio.Event | None = None
) -> tuple[Run, list[tuple[str, int, str]], list[Sender]]:
    log: list[tuple[str, int, str]] = []
    senders = [Sender("AB"[i], log, second) for i, second in enumerate(seconds)]
    async with asyncio.timeout(20):
        return await run(load, PROMPTS, senders, stop or asyncio.Event()), log, senders


async def test_closed_loop_keeps_its_number_under_way() -> None:
    done, log, (sender,) = await apply(Load(concurrency=3, requests=20), 0.005)
    assert len(done.samples) == 20
    assert not done.interrupted
    assert sender.most == [3]
    assert sorted(index for _, index, _ in log) == list(range(20))
    assert all(content == str(index % 3) for _, index, content in log), "prompts go round"


async def test_two_targets_are_asked_in_turns() -> None:
    _, log, _ = await apply(Load(concurrency=1, requests=40, seed=3), 0.0, 0.0)
    pairs = [log[i : i + 2] for i in range(0, len(log), 2)]
    assert all({name for name, _, _ in pair} == {"A", "B"} for pair in pairs)
    assert all(pair[0][1:] == pair[1][1:] for pair in pairs), "both are asked the same"
    assert Counter(pair[0][0] for pair in pairs) == {"A": 20, "B": 20}, "neither leads"
    leads = "".join(pair[0][0] for pair in pairs)
    assert "ABAB" * 5 not in leads, "and not in a rhythm"


@given(st.integers(0, 10_000), st.integers(0, 1000))
def test_a_pair_and_the_next_are_mirrored(pair: int, seed: int) -> None:
    first, second = turns(2 * pair, 2, seed), turns(2 * pair + 1, 2, seed)
    assert sorted(first) == [0, 1]
    assert second == first[::-1]
    assert turns(pair, 1, seed) == [0]


async def test_open_loop_does_not_wait_for_answers() -> None:
    done, _, (sender,) = await apply(Load(concurrency=None, rate=400.0, requests=40), 0.5)
    assert sender.most[0] > 20
    due = [sample.intended for sample in sorted(done.samples, key=lambda s: s.index)]
    assert due == list(itertools.islice(arrivals(400.0, 0, 0), 40)), "latency counts from the schedule"


async def test_open_loop_with_a_bound_queues_in_the_client() -> None:
    done, _, (sender,) = await apply(Load(concurrency=None, rate=400.0, requests=20, max_in_flight=2), 0.01)
    assert sender.most == [2]
    assert len(done.samples) == 20


async def test_open_loop_gives_each_target_its_rate() -> None:
    _, log, _ = await apply(Load(concurrency=None, rate=500.0, requests=60), 0.0, 0.0)
    names = "".join(name for name, _, _ in log)
    assert Counter(names) == {"A": 60, "B": 60}
    assert max(len(list(group)) for _, group in itertools.groupby(names)) < 15, "interleaved, not one after the other"


def test_arrivals_are_a_poisson_process() -> None:
    times = np.array(list(itertools.islice(arrivals(20.0, 7, 0), 20_000)))
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 20, rel=0.05)
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.2)
    again = list(itertools.islice(arrivals(20.0, 7, 0), 5))
    assert again == list(itertools.islice(arrivals(20.0, 7, 0), 5)) == times[:5].tolist()
    assert again != list(itertools.islice(arrivals(20.0, 7, 1), 5))


@pytest.mark.parametrize("load", [Load(concurrency=2, requests=None, duration=0.2), Load(None, 100.0, None, 0.2)])
async def test_time_bounds_it(load: Load) -> None:
    done, _, _ = await apply(load, 0.01)
    assert 0 < len(done.samples) < 200
    assert not done.interrupted


async def test_a_stop_keeps_what_was_answered() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.15, stop.set)
    done, _, _ = await apply(Load(concurrency=4, requests=None), 0.02, stop=stop)
    assert done.interrupted
    assert done.samples
    assert done.abandoned == 4


async def test_an_error_of_our_own_is_not_swallowed() -> None:
    async def broken(prompt: Prompt, index: int, began: float, intended: float | None = None) -> Sample:
        raise RuntimeError("a bug")

    for load in (Load(concurrency=2, requests=4), Load(None, 100.0, 3)):
        with pytest.raises(RuntimeError, match="a bug"):
            await run(load, PROMPTS, [broken], asyncio.Event())
