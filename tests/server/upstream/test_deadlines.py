"""A deadline or a timeout ends the calls, and the text that has arrived counts."""

from __future__ import annotations

import time

import pytest

from tests.engines.openai.upstream import FakeUpstream
from tests.server.conftest import USER
from tests.server.upstream.conftest import Serve, align_of

pytestmark = pytest.mark.slow

# A request that waited for the upstream would take far longer than this.
PROMPTLY = 20.0


@pytest.mark.parametrize("stream", [False, True])
def test_the_text_before_a_deadline_is_returned(
    up: FakeUpstream, serve_upstream: Serve, stream: bool
) -> None:
    server = serve_upstream()
    up.behave = lambda _, __: "drip"
    started = time.monotonic()
    answer = server.chat({"budget": {"deadline_seconds": 2.0}}, stream=stream)
    assert time.monotonic() - started < PROMPTLY
    assert answer.status_code == 200, answer.text
    assert stream or "0 1 2" in answer.text
    assert up.until(lambda: up.running == 0)


def test_unfinished_candidates_take_part_with_their_text(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    """Four of eight choices finish; the others are interrupted by the deadline."""
    up.behave = lambda _, __: "half_then_drip"
    answer = serve_upstream().chat({"best_of_n": {"n": 8}, "budget": {"deadline_seconds": 2.5}})
    align = align_of(answer)
    assert (up.calls, align["dropped"], align["partial"]) == (1, 0, True)
    reasons = [each["finish_reason"] for each in align["candidates"]]
    assert reasons == ["stop"] * 4 + ["length"] * 4
    assert up.until(lambda: up.running == 0)


def test_finished_candidates_count_if_the_others_hang(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    server = serve_upstream('n = "single"')
    up.behave = lambda call, _: "hang" if call % 2 else "ok"
    align = align_of(server.chat({"best_of_n": {"n": 6}, "budget": {"deadline_seconds": 4.0}}))
    assert align["partial"] is True
    assert align["dropped"] == 3
    assert up.until(lambda: up.running == 0)


def test_a_deadline_without_any_text_fails(up: FakeUpstream, serve_upstream: Serve) -> None:
    server = serve_upstream()
    up.behave = lambda _, __: "hang"
    assert server.chat({"budget": {"deadline_seconds": 0.5}}).status_code == 504
    assert up.until(lambda: up.running == 0)


def test_the_clients_own_timeout_is_a_deadline(up: FakeUpstream, serve_upstream: Serve) -> None:
    server = serve_upstream()
    up.behave = lambda _, __: "hang"
    started = time.monotonic()
    body = {"model": "up", "messages": USER}
    answer = server.post(body, headers={"x-stainless-read-timeout": "1"})
    assert answer.status_code == 504
    assert time.monotonic() - started < PROMPTLY
    assert up.until(lambda: up.running == 0)


def test_a_call_that_timed_out_is_not_repeated(up: FakeUpstream, serve_upstream: Serve) -> None:
    """The upstream may have done the work."""
    server = serve_upstream("timeout_seconds = 2.0")
    up.behave = lambda _, __: "hang"
    assert server.chat().status_code == 504
    assert up.calls == 1
