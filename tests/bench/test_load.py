"""The loops: what is sent, in which order, and from when its latency counts."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align_bench.against import against
from infer_align_bench.figures import figures
from infer_align_bench.load import arrivals, run, slices, turns
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

    async def __call__(
        self, prompt: Prompt, index: int, began: float, intended: float | None = None
    ) -> Sample:
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
        return (
            await run(load, PROMPTS, {one.name: one for one in senders}, stop or asyncio.Event()),
            log,
            senders,
        )


async def test_closed_loop_keeps_its_number_under_way() -> None:
    done, log, (sender,) = await apply(Load(concurrency=3, requests=20), 0.005)
    assert len(done.samples) == 20
    assert not done.interrupted
    assert sender.most == [3]
    assert sorted(index for _, index, _ in log) == list(range(20))
    assert all(content == str(index % 3) for _, index, content in log), "prompts go round"


async def test_two_targets_are_asked_in_slices() -> None:
    done, log, senders = await apply(Load(concurrency=2, requests=40, seed=3), 0.002, 0.001)
    blocks = [
        (name, [index for _, index, _ in part])
        for name, part in itertools.groupby(log, key=lambda one: one[0])
    ]
    assert Counter(name for name, _, _ in log) == {"A": 40, "B": 40}
    asked = {
        side: sorted((index, content) for name, index, content in log if name == side)
        for side in "AB"
    }
    assert asked["A"] == asked["B"], "both are asked the same"
    assert 3 <= len(blocks) <= 8, "slices of eight, of which two may touch"
    assert all(len(indices) >= 8 for _, indices in blocks)
    assert [sender.most for sender in senders] == [[2], [2]]
    spans = sorted(done.spans, key=lambda span: span.began)
    assert all(a.ended <= b.began for a, b in itertools.pairwise(spans)), "never both at once"
    assert Counter(span.target for span in spans[::2]) == {"A": 2, "B": 2}, "neither leads"


@dataclass
class Queue:
    """An endpoint that answers one request at a time: its rate is 1 / seconds, whoever asks."""

    name: str
    seconds: float
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def __call__(
        self, prompt: Prompt, index: int, began: float, intended: float | None = None
    ) -> Sample:
        started = perf_counter() - began
        async with self.lock:
            await asyncio.sleep(self.seconds)
        return Sample(
            self.name,
            index,
            started if intended is None else intended,
            started,
            perf_counter() - began,
            returned=1,
        )


def figures_of(done: Run, load: Load, name: str) -> tuple[float, float]:
    """Requests per second and the median latency of a target."""
    samples, spans = (
        [s for s in done.samples if s.target == name],
        [s for s in done.spans if s.target == name],
    )
    found = figures(samples, spans, load, {})
    return found["rates"]["requests_per_second"]["value"], found["latency_ms"]["e2e"]["p50"][
        "value"
    ]


async def test_beside_a_slow_target_a_fast_one_is_measured_as_alone() -> None:
    """A slow target must not keep the places, so that the fast one is hardly asked and seems faster than it is."""
    load, fast, slow = Load(concurrency=4, requests=48), 0.01, 0.04
    alone = await run(load, PROMPTS, {"B": Queue("B", fast)}, asyncio.Event())
    both = await run(load, PROMPTS, {"A": Queue("A", slow), "B": Queue("B", fast)}, asyncio.Event())
    assert figures_of(both, load, "B")[0] == pytest.approx(figures_of(alone, load, "B")[0], rel=0.5)
    assert figures_of(both, load, "B")[0] <= 1 / fast, "no more than it can"
    assert 0.5 / slow <= figures_of(both, load, "A")[0] <= 1 / slow
    assert figures_of(both, load, "B")[1] >= 0.9 * 4 * fast * 1e3, "it bears four at once"
    found = against(both, ("A", "B"), {}, 0)
    assert found["requests_per_second"]["value"] == pytest.approx(fast / slow, rel=0.5)
    assert found["e2e"]["p50"]["value"] == pytest.approx(slow / fast, rel=0.5)


async def test_fewer_requests_than_places() -> None:
    load = Load(concurrency=16, requests=3)
    both = await run(load, PROMPTS, {"A": Queue("A", 0.02), "B": Queue("B", 0.02)}, asyncio.Event())
    assert 25 <= figures_of(both, load, "A")[0] <= 50


@pytest.mark.parametrize(
    ("load", "targets", "expected"),
    [
        (Load(8, requests=200), 1, [(200, None)]),
        (
            Load(8, requests=200),
            2,
            [(34, None), (34, None), (33, None), (33, None), (33, None), (33, None)],
        ),
        (Load(1, requests=400), 2, [(40, None)] * 10),
        (Load(64, requests=100), 2, [(100, None)]),
        (Load(8, requests=None, duration=60.0), 2, [(None, 3.0)] * 10),
        (Load(8, requests=None, duration=9.0), 2, [(None, 1.125)] * 4),
        (Load(8, requests=None, duration=1.0), 2, [(None, 0.5)]),
        (Load(8, requests=5, duration=1.0), 1, [(5, 1.0)]),
    ],
)
def test_slices(load: Load, targets: int, expected: list[tuple[int | None, float | None]]) -> None:
    assert slices(load, targets) == expected


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
    assert due == list(itertools.islice(arrivals(400.0, 0, 0), 40)), (
        "latency counts from the schedule"
    )


async def test_open_loop_with_a_bound_queues_in_the_client() -> None:
    done, _, (sender,) = await apply(
        Load(concurrency=None, rate=400.0, requests=20, max_in_flight=2), 0.01
    )
    assert sender.most == [2]
    assert len(done.samples) == 20


async def test_the_bound_is_each_targets_own() -> None:
    """A target that stands still fills its own places only."""
    load = Load(None, rate=200.0, requests=20, max_in_flight=1)
    done = await run(
        load, PROMPTS, {"A": Queue("A", 0.06), "B": Queue("B", 0.001)}, asyncio.Event()
    )
    assert figures_of(done, load, "A")[1] > 200
    assert figures_of(done, load, "B")[1] < 100


async def test_open_loop_gives_each_target_its_rate() -> None:
    _, log, _ = await apply(Load(concurrency=None, rate=500.0, requests=60), 0.0, 0.0)
    names = "".join(name for name, _, _ in log)
    assert Counter(names) == {"A": 60, "B": 60}
    assert max(len(list(group)) for _, group in itertools.groupby(names)) < 15, (
        "interleaved, not one after the other"
    )


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


@pytest.mark.parametrize(
    "load", [Load(concurrency=2, requests=None, duration=0.2), Load(None, 100.0, None, 0.2)]
)
async def test_time_bounds_it(load: Load) -> None:
    done, _, _ = await apply(load, 0.01)
    assert 0 < len(done.samples) < 200
    assert not done.interrupted


@pytest.mark.parametrize(
    "load",
    [
        Load(3, None, None, 0.1, grace=0.2),
        Load(3, None, 50, 0.1, grace=0.2),
        Load(None, 200.0, None, 0.1, grace=0.2),
        Load(None, 200.0, None, 0.1, grace=0.2, max_in_flight=2),
    ],
)
async def test_what_does_not_end_in_time_is_given_up_and_counted(load: Load) -> None:
    began = perf_counter()
    done, log, (sender,) = await apply(load, 60.0)
    assert perf_counter() - began < 2
    assert {sample.error for sample in done.samples} == {"given up"}
    due = (
        3
        if load.rate is None
        else sum(1 for _ in itertools.takewhile(lambda at: at < 0.1, arrivals(200.0, 0, 0)))
    )
    assert len(done.samples) == due >= len(log)
    unsent = [sample for sample in done.samples if "never sent" in sample.message]
    assert len(unsent) == due - len(log)
    assert sender.most == [load.max_in_flight or due]
    assert not done.interrupted
    assert figures(done.samples, done.spans, load, {})["rates"]["requests_per_second"]["value"] == 0


async def test_a_stop_counts_what_was_due_and_not_sent() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.2, stop.set)
    done, log, _ = await apply(Load(None, 200.0, 100, max_in_flight=2), 60.0, stop=stop)
    assert (done.abandoned, len(log), len(done.samples)) == (2, 2, 0)
    due = sum(1 for _ in itertools.takewhile(lambda at: at < 0.2, arrivals(200.0, 0, 0)))
    assert done.unsent == pytest.approx(due - 2, abs=5)


async def test_a_stop_keeps_what_was_answered() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.15, stop.set)
    done, _, _ = await apply(Load(concurrency=4, requests=None), 0.02, stop=stop)
    assert done.interrupted
    assert done.samples
    assert done.abandoned == 4


async def test_an_error_of_our_own_is_not_swallowed() -> None:
    async def broken(
        prompt: Prompt, index: int, began: float, intended: float | None = None
    ) -> Sample:
        raise RuntimeError("a bug")

    for load in (Load(concurrency=2, requests=4), Load(None, 100.0, 3)):
        with pytest.raises(RuntimeError, match="a bug"):
            await run(load, PROMPTS, {"A": broken}, asyncio.Event())
