"""The deadlines of a request, and the seconds of its stages, with explicit times."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from infer_align.flow.clock import TIMER_SLACK_SECONDS, Clock, loop_time
from infer_align.flow.response import Timing


@pytest.fixture
def set_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that sets the monotonic time that clocks read; it starts at 100."""

    def set_to(seconds: float) -> None:
        monkeypatch.setattr("infer_align.flow.clock.monotonic", lambda: seconds)

    set_to(100.0)
    return set_to


@pytest.mark.usefixtures("set_time")
def test_a_fifth_of_the_deadline_is_reserved_for_scoring() -> None:
    clock = Clock(10.0, scores=True)
    assert (clock.draw_deadline, clock.deadline) == (108.0, 110.0)


@pytest.mark.usefixtures("set_time")
def test_without_scoring_drawing_may_take_the_whole_deadline() -> None:
    clock = Clock(10.0, scores=False)
    assert (clock.draw_deadline, clock.deadline) == (110.0, 110.0)


@pytest.mark.parametrize("scores", [True, False])
def test_without_a_deadline_a_request_is_never_late(
    set_time: Callable[[float], None], scores: bool
) -> None:
    clock = Clock(None, scores=scores)
    set_time(1e9)
    assert (clock.draw_deadline, clock.deadline, clock.late) == (None, None, False)


def test_a_request_is_late_from_its_deadline_on(set_time: Callable[[float], None]) -> None:
    clock = Clock(10.0, scores=True)
    for now, late in ((100.0, False), (108.0, False), (109.9, False), (110.0, True), (111.0, True)):
        set_time(now)
        assert clock.late is late


def test_a_timer_that_fires_a_little_early_has_met_the_deadline(
    set_time: Callable[[float], None],
) -> None:
    clock = Clock(10.0, scores=True)
    set_time(110.0 - TIMER_SLACK_SECONDS / 2)
    assert clock.late


def test_the_stages_add_up(set_time: Callable[[float], None]) -> None:
    clock = Clock(None, scores=True)
    with clock.drawing():
        set_time(103.0)
    set_time(104.0)
    assert clock.timing() == Timing(generate_seconds=3.0, score_seconds=1.0, total_seconds=4.0)


def test_the_seconds_of_several_batches_are_summed(set_time: Callable[[float], None]) -> None:
    clock = Clock(None, scores=True)
    with clock.drawing():
        set_time(103.0)
    set_time(104.0)
    with clock.drawing():
        set_time(106.0)
    set_time(108.0)
    assert clock.timing() == Timing(generate_seconds=5.0, score_seconds=3.0, total_seconds=8.0)


def test_drawing_is_late_before_the_request_is(set_time: Callable[[float], None]) -> None:
    clock = Clock(10.0, scores=True)
    set_time(107.0)
    assert not clock.drawing_is_late
    set_time(108.0)
    assert clock.drawing_is_late
    assert not clock.late
    assert not Clock(None, scores=True).drawing_is_late


@pytest.mark.usefixtures("set_time")
def test_a_deadline_is_converted_to_the_time_of_the_event_loop() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        earliest = loop.time() + 5.0
        converted = loop_time(105.0)
        assert earliest <= converted <= loop.time() + 5.0

    asyncio.run(scenario())
