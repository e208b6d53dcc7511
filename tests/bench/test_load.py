"""The loops send the right requests in the right order, in virtual time."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align_bench.comparison import compare
from infer_align_bench.load import Sender, apply_load, arrivals, slices, target_order
from infer_align_bench.report import build_report
from infer_align_bench.summary import summarize
from infer_align_bench.tables import notes
from infer_align_bench.types import ChatPrompt, Load, Run, Sample, Target
from tests.bench.virtual_time import run_virtual

# Seconds in which an endpoint answers nothing.
STALL = 0.6
PROMPTS = [ChatPrompt(({"role": "user", "content": str(i)},)) for i in range(3)]


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class Endpoint:
    """Answers every request after `seconds` and logs the requests."""

    name: str
    seconds: float = 0.0
    # (name, index, content) of each request; endpoints may share a log.
    log: list[tuple[str, int, str]] = field(default_factory=list)
    in_flight: int = 0
    max_in_flight: int = 0

    async def __call__(
        self, prompt: ChatPrompt, index: int, began: float, intended: float | None = None
    ) -> Sample:
        started = now() - began
        self.log.append((self.name, index, prompt.messages[0]["content"]))
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        await asyncio.sleep(self.seconds)
        self.in_flight -= 1
        due = started if intended is None else intended
        return Sample(self.name, index, due, started, now() - began, returned=1)


@dataclass
class SerialEndpoint:
    """Answers one request at a time, so that its highest rate is 1 / seconds."""

    name: str
    seconds: float
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def __call__(
        self, prompt: ChatPrompt, index: int, began: float, intended: float | None = None
    ) -> Sample:
        started = now() - began
        async with self.lock:
            await asyncio.sleep(self.seconds)
        due = started if intended is None else intended
        return Sample(self.name, index, due, started, now() - began, returned=1)


@dataclass
class StallingEndpoint:
    """Answers in 1 ms, except that request 30 stops all answers for STALL seconds."""

    name: str
    stalled_until: float = 0.0

    async def __call__(
        self, prompt: ChatPrompt, index: int, began: float, intended: float | None = None
    ) -> Sample:
        started = now() - began
        if index == 30:
            self.stalled_until = now() + STALL
        await asyncio.sleep(max(0.001, self.stalled_until - now()))
        due = started if intended is None else intended
        return Sample(self.name, index, due, started, now() - began, returned=1)


def apply(
    load: Load,
    *endpoints: Endpoint | SerialEndpoint | StallingEndpoint,
    stop_after: float | None = None,
) -> Run:
    """Apply a load to endpoints; set the stop event after `stop_after` seconds."""
    senders: Mapping[str, Sender] = {endpoint.name: endpoint for endpoint in endpoints}

    async def work() -> Run:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        if stop_after is not None:
            loop.call_later(stop_after, stop.set)
        return await apply_load(load, PROMPTS, senders, stop, clock=loop.time)

    return run_virtual(work())


def rate_and_median(run: Run, load: Load, name: str) -> tuple[float, float]:
    """Return the requests per second and the median latency in milliseconds of a target."""
    samples = [sample for sample in run.samples if sample.target == name]
    spans = [span for span in run.spans if span.target == name]
    summary = summarize(samples, spans, load, {})
    rate = summary["rates"]["requests_per_second"]["value"]
    return rate, summary["latency_ms"]["e2e"]["p50"]["value"]


def due_before(rate: float, end: float) -> int:
    """Count the arrivals of the first target before a time."""
    return sum(1 for _ in itertools.takewhile(lambda due: due < end, arrivals(rate, 0, 0)))


def test_a_closed_loop_keeps_its_number_in_flight() -> None:
    endpoint = Endpoint("A", 0.005)
    run = apply(Load(concurrency=3, requests=20), endpoint)
    assert len(run.samples) == 20
    assert not run.interrupted
    assert endpoint.max_in_flight == 3
    assert run.seconds == pytest.approx(7 * 0.005)
    assert sorted(index for _, index, _ in endpoint.log) == list(range(20))
    assert all(content == str(index % 3) for _, index, content in endpoint.log)


def test_two_targets_get_slices() -> None:
    log: list[tuple[str, int, str]] = []
    first = Endpoint("A", 0.002, log)
    second = Endpoint("B", 0.001, log)
    run = apply(Load(concurrency=2, requests=40, seed=3), first, second)
    blocks = []
    for name, group in itertools.groupby(log, key=lambda request: request[0]):
        blocks.append((name, len(list(group))))
    assert Counter(name for name, _, _ in log) == {"A": 40, "B": 40}
    requests = {name: sorted(entry[1:] for entry in log if entry[0] == name) for name in "AB"}
    assert requests["A"] == requests["B"], "both get the same requests"
    assert 3 <= len(blocks) <= 8, "slices of eight, of which two may touch"
    assert all(size >= 8 for _, size in blocks)
    assert [first.max_in_flight, second.max_in_flight] == [2, 2]
    spans = sorted(run.spans, key=lambda span: span.began)
    for earlier, later in itertools.pairwise(spans):
        assert earlier.ended <= later.began, "never both at once"
    assert Counter(span.target for span in spans[::2]) == {"A": 2, "B": 2}, "each leads equally"


@pytest.mark.slow
def test_a_slow_target_does_not_change_the_other_ones_figures() -> None:
    load = Load(concurrency=4, requests=48)
    fast, slow = 0.01, 0.04
    alone = apply(load, SerialEndpoint("B", fast))
    both = apply(load, SerialEndpoint("A", slow), SerialEndpoint("B", fast))
    rate, median = rate_and_median(both, load, "B")
    assert rate == pytest.approx(rate_and_median(alone, load, "B")[0])
    assert rate == pytest.approx(1 / fast)
    assert median == pytest.approx(4 * fast * 1e3), "four requests share the endpoint"
    assert rate_and_median(both, load, "A")[0] == pytest.approx(1 / slow)
    ratios = compare(both, ("A", "B"), {}, 0)
    assert ratios["requests_per_second"]["value"] == pytest.approx(fast / slow)
    assert ratios["e2e"]["p50"]["value"] == pytest.approx(slow / fast)


def test_a_run_may_have_fewer_requests_than_concurrency() -> None:
    load = Load(concurrency=16, requests=3)
    both = apply(load, SerialEndpoint("A", 0.02), SerialEndpoint("B", 0.02))
    assert rate_and_median(both, load, "A")[0] == pytest.approx(50)


@pytest.mark.parametrize(
    ("load", "targets", "expected"),
    [
        (Load(8, requests=200), 1, [(200, None)]),
        (Load(8, requests=200), 2, [(34, None)] * 2 + [(33, None)] * 4),
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
def test_every_second_round_reverses_the_order(pair: int, seed: int) -> None:
    first = target_order(2 * pair, 2, seed)
    second = target_order(2 * pair + 1, 2, seed)
    assert sorted(first) == [0, 1]
    assert second == first[::-1]
    assert target_order(pair, 1, seed) == [0]


def test_an_open_loop_does_not_wait_for_answers() -> None:
    endpoint = Endpoint("A", 0.5)
    run = apply(Load(concurrency=None, rate=400.0, requests=40), endpoint)
    assert endpoint.max_in_flight == 40
    due = [sample.intended for sample in sorted(run.samples, key=lambda sample: sample.index)]
    assert due == list(itertools.islice(arrivals(400.0, 0, 0), 40)), "latency counts from here"


def delayed(run: Run, since: str) -> int:
    """Count the requests that took over a sixth of the stall."""
    return sum(sample.ended - getattr(sample, since) > STALL / 6 for sample in run.samples)


def test_a_closed_loop_hides_a_stall() -> None:
    run = apply(Load(concurrency=1, requests=100), StallingEndpoint("A"))
    assert delayed(run, "intended") == 1, "no other request is sent meanwhile"


def test_an_open_loop_shows_a_stall_in_all_requests_that_are_due_meanwhile() -> None:
    load = Load(None, rate=100.0, requests=100)
    run = apply(load, StallingEndpoint("A"))
    due = [sample.intended for sample in sorted(run.samples, key=lambda sample: sample.index)]
    in_stall = sum(due[30] <= time < due[30] + STALL * 5 / 6 for time in due)
    assert delayed(run, "intended") == in_stall >= 25
    summary = summarize(run.samples, run.spans, load, {})
    assert summary["latency_ms"]["e2e"]["p90"]["value"] > STALL * 1e3 / 6


def test_waiting_in_the_client_counts_as_latency() -> None:
    load = Load(None, rate=100.0, requests=100, max_in_flight=1)
    run = apply(load, StallingEndpoint("A"))
    assert delayed(run, "started") == 1, "from the time of sending, the stall would disappear"
    assert delayed(run, "intended") >= 25
    report = build_report(run, [Target("A", "http://a/v1", "m")], load, {}, {})
    target = report["targets"]["A"]
    assert target["latency_ms"]["e2e"]["p90"]["value"] > STALL * 1e3 / 6
    assert any("or --max-in-flight, was the limit" in note for note in notes(target))


def test_an_open_loop_with_a_limit_queues_in_the_client() -> None:
    endpoint = Endpoint("A", 0.01)
    load = Load(concurrency=None, rate=400.0, requests=20, max_in_flight=2)
    run = apply(load, endpoint)
    assert endpoint.max_in_flight == 2
    assert len(run.samples) == 20


@pytest.mark.slow
def test_each_target_has_a_limit_of_its_own() -> None:
    load = Load(None, rate=200.0, requests=20, max_in_flight=1)
    run = apply(load, SerialEndpoint("A", 0.06), SerialEndpoint("B", 0.001))
    assert rate_and_median(run, load, "A")[1] > 200
    assert rate_and_median(run, load, "B")[1] < 10, "a stalled target fills its own places only"


def test_an_open_loop_gives_each_target_its_rate() -> None:
    log: list[tuple[str, int, str]] = []
    load = Load(concurrency=None, rate=500.0, requests=60)
    apply(load, Endpoint("A", log=log), Endpoint("B", log=log))
    names = [name for name, _, _ in log]
    assert Counter(names) == {"A": 60, "B": 60}
    runs = [len(list(group)) for _, group in itertools.groupby(names)]
    assert max(runs) < 15, "interleaved, not one after the other"


def test_arrivals_are_a_poisson_process() -> None:
    times = np.array(list(itertools.islice(arrivals(20.0, 7, 0), 20_000)))
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 20, rel=0.05)
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.2)
    assert list(itertools.islice(arrivals(20.0, 7, 0), 5)) == times[:5].tolist()
    assert list(itertools.islice(arrivals(20.0, 7, 1), 5)) != times[:5].tolist()


def test_a_duration_bounds_a_closed_loop() -> None:
    run = apply(Load(concurrency=2, requests=None, duration=0.195), Endpoint("A", 0.01))
    assert len(run.samples) == 40
    assert not run.interrupted


def test_a_duration_bounds_an_open_loop() -> None:
    run = apply(Load(None, 100.0, None, 0.2), Endpoint("A", 0.01))
    assert len(run.samples) == due_before(100.0, 0.2)
    assert not run.interrupted


@pytest.mark.parametrize(
    "load",
    [
        Load(3, None, None, 0.1, grace=0.2),
        Load(3, None, 50, 0.1, grace=0.2),
        Load(None, 200.0, None, 0.1, grace=0.2),
        Load(None, 200.0, None, 0.1, grace=0.2, max_in_flight=2),
    ],
)
def test_unfinished_requests_are_given_up_and_counted(load: Load) -> None:
    endpoint = Endpoint("A", 60.0)
    run = apply(load, endpoint)
    assert run.seconds == pytest.approx(0.3, abs=0.01), "the duration and the grace"
    assert {sample.error for sample in run.samples} == {"given up"}
    due = 3 if load.rate is None else due_before(200.0, 0.1)
    sent = len(endpoint.log)
    assert len(run.samples) == due >= sent
    unsent = [sample for sample in run.samples if "never sent" in sample.message]
    assert len(unsent) == due - sent
    assert endpoint.max_in_flight == (load.max_in_flight or due)
    assert not run.interrupted
    summary = summarize(run.samples, run.spans, load, {})
    assert summary["rates"]["requests_per_second"]["value"] == 0


def test_a_stop_counts_requests_that_were_due_but_not_sent() -> None:
    endpoint = Endpoint("A", 60.0)
    run = apply(Load(None, 200.0, 100, max_in_flight=2), endpoint, stop_after=0.2)
    assert (run.abandoned, len(endpoint.log), len(run.samples)) == (2, 2, 0)
    assert run.unsent == due_before(200.0, 0.2) - 2


def test_a_stop_keeps_the_answered_requests() -> None:
    run = apply(Load(concurrency=4, requests=None), Endpoint("A", 0.02), stop_after=0.15)
    assert run.interrupted
    assert len(run.samples) == 4 * 7
    assert run.abandoned == 4


@pytest.mark.parametrize("load", [Load(concurrency=2, requests=4), Load(None, 100.0, 3)])
def test_an_error_of_our_own_is_raised(load: Load) -> None:
    async def broken(
        prompt: ChatPrompt, index: int, began: float, intended: float | None = None
    ) -> Sample:
        raise RuntimeError("a bug")

    async def work() -> Run:
        return await apply_load(load, PROMPTS, {"A": broken}, asyncio.Event())

    with pytest.raises(RuntimeError, match="a bug"):
        run_virtual(work())
