"""Test that the body of a draw is parsed and checked by vLLM, and not twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from infer_align.engines.vllm.body import Bodies
from infer_align.errors import InvalidRequest
from infer_align.types import Draw
from tests.engines.vllm.stepping import WARNINGS
from tests.server.conftest import Live

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300), *WARNINGS]

MESSAGES = [{"role": "user", "content": "Hello"}]


class CountedFrontend:
    """vLLM's OpenAI layer, which counts its calls."""

    def __init__(self, frontend: Any) -> None:
        self._frontend = frontend
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._frontend, name)
        if name not in {"parse", "check"}:
            return attribute

        def counted(*args: Any) -> Any:
            self.calls.append(name)
            return attribute(*args)

        return counted


@pytest.fixture
def frontend(live: Live) -> CountedFrontend:
    started = live.service.engine._started  # type: ignore[attr-defined]
    return CountedFrontend(started.frontend)


@pytest.fixture
def bodies(frontend: CountedFrontend) -> Bodies:
    return Bodies(frontend)  # type: ignore[arg-type]


def draw_of(**fields: Any) -> Draw:
    return Draw({"model": "owl", "messages": MESSAGES, "max_tokens": 4, **fields})


def test_a_checked_body_is_parsed_once(bodies: Bodies, frontend: CountedFrontend) -> None:
    draw = draw_of(temperature=0.5)
    bodies.check(draw)
    request: Any = bodies.take(draw)
    assert request.temperature == 0.5
    assert frontend.calls == ["parse", "check"]
    # vLLM changes requests, so each draw has its own.
    assert bodies.take(draw) is not request


@pytest.mark.parametrize(
    "other", [draw_of(temperature=0.7), draw_of(temperature=0.5)], ids=["different", "equal"]
)
def test_another_body_is_parsed(bodies: Bodies, other: Draw) -> None:
    draw = draw_of(temperature=0.5)
    bodies.check(draw)
    request: Any = bodies.take(other)
    assert request.temperature == other.body["temperature"]
    # The first one still waits for its own draw.
    taken: Any = bodies.take(draw)
    assert taken is not request
    assert taken.temperature == 0.5


def test_a_draw_that_streams_has_another_request(bodies: Bodies) -> None:
    draw = draw_of()
    bodies.check(draw)
    streaming = Draw(draw.body, deltas=True)
    request: Any = bodies.take(streaming)
    assert request.stream
    unstreamed: Any = bodies.take(draw)
    assert not unstreamed.stream


def test_equal_sampling_is_checked_once(bodies: Bodies, frontend: CountedFrontend) -> None:
    for text in ("one", "two", "three"):
        messages = [{"role": "user", "content": text}]
        bodies.check(draw_of(messages=messages, top_p=0.9, user=text))
    assert frontend.calls.count("check") == 1
    bodies.check(draw_of(top_p=0.8))
    assert frontend.calls.count("check") == 2


def test_a_long_text_is_not_kept(bodies: Bodies, frontend: CountedFrontend) -> None:
    for _ in range(2):
        bodies.check(draw_of(stop="x" * 1000))
    assert frontend.calls.count("check") == 2


@pytest.mark.parametrize(
    "refuse",
    [
        lambda: draw_of(temperature=-1.0),
        lambda: draw_of(top_p=2.0),
        lambda: draw_of(stop=["a", ""]),
        lambda: draw_of(min_tokens=9),
    ],
)
def test_what_vllm_refuses_is_refused_each_time(bodies: Bodies, refuse: Callable[[], Draw]) -> None:
    bodies.check(draw_of())
    messages = []
    for _ in range(2):
        with pytest.raises(InvalidRequest) as caught:
            bodies.check(refuse())
        messages.append(caught.value.message)
    assert messages[0] == messages[1]


def test_a_number_and_a_truth_value_are_different_fields(
    bodies: Bodies, frontend: CountedFrontend
) -> None:
    bodies.check(draw_of(min_p=0))
    bodies.check(draw_of(min_p=0.0))
    assert frontend.calls.count("check") == 2
