"""A fault of the upstream has its own status and message, and costs only its own candidates."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass

import pytest

from infer_align.upstream import client
from tests.engines.openai.upstream import FakeUpstream
from tests.server.upstream.conftest import (
    BEST_OF_4,
    Serve,
    align_of,
    content_of,
)

pytestmark = pytest.mark.slow

# A request with `align` is drawn and not passed on; test_forwarding.py has the others.
ALIGNED: dict[str, object] = {}
BEST_OF_8 = {"best_of_n": {"n": 8}}


@dataclass(frozen=True)
class Fault:
    """A fault, and what becomes of a request.

    Attributes:
        name: the behaviour of the upstream.
        status: the status for the client.
        message: a part of the message for the client.
        calls: the calls of a request for one candidate.
        calls_of_4: the calls of a best-of-4.
    """

    name: str
    status: int
    message: str
    calls: int = 1
    calls_of_4: int = 1


FAULTS = [
    Fault("error_500", 500, "the GPU is on fire"),
    # A refused call for four candidates is repeated for one: the number may be the reason.
    Fault("error_400", 400, "top_p is 7, which is too much", calls_of_4=2),
    Fault("error_404", 404, "The model `up` does not exist.", calls_of_4=2),
    Fault("error_422", 400, "not a number", calls_of_4=2),
    Fault("error_429", 429, "slow down", calls=3, calls_of_4=3),
    Fault("error_429_long", 429, "slow down"),
    Fault("error_502", 502, "502"),
    Fault("error_503", 503, "loading", calls=3, calls_of_4=3),
    Fault("error_504", 504, "too late"),
    Fault("redirect", 502, "not followed"),
    Fault("garbage", 502, "not JSON"),
    Fault("html", 502, "not JSON"),
    Fault("sse_as_json", 502, "not JSON"),
    Fault("error_in_200", 502, "no credits left"),
    Fault("a_list", 502, "not an object"),
    Fault("no_choices", 502, "no choices"),
    Fault("truncated", 502, "broke off"),
    # The first call goes over the connection that has listed the models, and is retried.
    Fault("reset", 502, "lost", calls=2),
    # These answers hold one choice; the three others are requested alone.
    Fault("message_missing", 502, "without a message", calls_of_4=4),
    Fault("message_of_text", 502, "without a message", calls_of_4=4),
    Fault("infinite", 502, "without proper JSON", calls_of_4=4),
    Fault("half_a_character", 502, "without proper JSON", calls_of_4=4),
    Fault("choices_of_text", 502, "without anything in it", calls_of_4=4),
]


def by_name(fault: Fault) -> str:
    return fault.name


@pytest.mark.parametrize("fault", FAULTS, ids=by_name)
def test_a_fault_has_its_status_and_its_message(
    up: FakeUpstream, serve_upstream: Serve, fault: Fault
) -> None:
    server = serve_upstream()
    up.behave = lambda _, __: fault.name
    for align, calls in ((ALIGNED, fault.calls), (BEST_OF_4, fault.calls_of_4)):
        up.clear_log()
        answer = server.chat(align)
        assert answer.status_code == fault.status, answer.text
        error = answer.json()["error"]
        assert fault.message in error["message"]
        assert set(error) == {"message", "type", "param", "code"}
        assert up.calls == calls
        assert up.until(lambda: up.running == 0)


def test_param_and_code_of_a_refusal_are_returned(up: FakeUpstream, serve_upstream: Serve) -> None:
    up.behave = lambda _, __: "error_400"
    error = serve_upstream().chat(BEST_OF_4).json()["error"]
    assert (error["param"], error["code"]) == ("top_p", "bad_top_p")


def test_a_long_retry_after_is_returned(up: FakeUpstream, serve_upstream: Serve) -> None:
    up.behave = lambda _, __: "error_429_long"
    assert serve_upstream().chat(BEST_OF_4).headers["retry-after"] == "77"


# --- streams ---


@pytest.mark.parametrize(
    "fault", [fault for fault in FAULTS if fault.name != "truncated"], ids=by_name
)
def test_a_fault_before_a_stream_begins_has_its_status(
    up: FakeUpstream, serve_upstream: Serve, fault: Fault
) -> None:
    server = serve_upstream()
    up.behave = lambda _, __: fault.name
    answer = server.chat(ALIGNED, stream=True)
    assert answer.status_code == fault.status
    assert answer.json()["error"]["message"]
    assert up.until(lambda: up.running == 0)


@pytest.mark.parametrize(
    "fault", ["truncated", "ended_early", "garbage_in_stream", "odd_in_stream"]
)
def test_a_fault_in_a_stream_ends_it_with_an_error(
    up: FakeUpstream, serve_upstream: Serve, fault: str
) -> None:
    server = serve_upstream()
    up.behave = lambda _, __: fault
    up.reader_is_ready = threading.Event()
    messages = [{"role": "user", "content": "x"}]
    body = {"model": "up", "messages": messages, "stream": True, "align": ALIGNED}
    text = ""
    with (
        server.http() as http,
        http.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        assert response.status_code == 200
        for piece in response.iter_text():
            text += piece
            # The upstream goes on once the client has the first half.
            if "half an" in text:
                up.reader_is_ready.set()
    lines = [line for line in text.splitlines() if line.startswith("data: ")]
    *chunks, last = [json.loads(line.removeprefix("data: ")) for line in lines]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == "half an"
    assert "error" in last
    assert up.until(lambda: up.running == 0)


# --- retries ---


@pytest.mark.parametrize(
    ("fault", "wait"), [("error_429", 0.2), ("error_503", 0.0), ("reset", 0.0)]
)
def test_a_call_that_cost_nothing_is_retried(
    up: FakeUpstream, serve_upstream: Serve, fault: str, wait: float
) -> None:
    server = serve_upstream()
    up.behave = lambda call, _: fault if call == 0 else "ok"
    started = time.monotonic()
    align = align_of(server.chat(BEST_OF_4))
    assert up.calls == align["usage"]["engine_calls"] == 2
    assert align["dropped"] == 0
    assert time.monotonic() - started >= wait, "Retry-After was not kept"


@pytest.mark.parametrize("fault", ["error_502", "slow_reset"])
def test_a_call_that_may_have_cost_something_is_not_retried(
    up: FakeUpstream, serve_upstream: Serve, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(client, "STALE_SECONDS", 0.25)
    server = serve_upstream()
    up.behave = lambda _, __: fault
    assert server.chat().status_code == 502
    assert up.calls == 1


# --- several candidates ---


@pytest.mark.parametrize(
    "fault",
    [
        "error_500",
        "garbage",
        "truncated",
        "error_504",
        "message_missing",
        "infinite",
        "half_a_character",
        "sse_as_json",
        "reset",
    ],
)
def test_the_other_candidates_count_if_some_fail(
    up: FakeUpstream, serve_upstream: Serve, fault: str
) -> None:
    server = serve_upstream('n = "single"')
    up.behave = lambda call, _: fault if call % 2 else "ok"
    align = align_of(server.chat({**BEST_OF_8, "rewards": {"number": 1}}))
    assert up.calls == align["usage"]["engine_calls"]
    # A lost connection is retried if it had been kept alive, so that fewer may fail.
    if fault != "reset":
        assert (up.calls, align["dropped"]) == (8, 4)
    candidates = align["candidates"]
    objectives = [each["objective"] for each in candidates if each["error"] is None]
    assert len(objectives) == 8 - align["dropped"]
    assert candidates[align["selected"]]["objective"] == max(objectives)
    assert up.until(lambda: up.running == 0)


def test_malformed_choices_are_dropped_and_the_others_count(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    """One call returns eight choices, half of them malformed."""
    up.behave = lambda _, __: "half_flawed"
    answer = serve_upstream().chat(BEST_OF_8)
    align = align_of(answer)
    assert (up.calls, align["dropped"], align["selected"]) == (1, 4, 2)
    assert sum("without" in (each["error"] or "") for each in align["candidates"]) == 4
    # The upstream reports -5 tokens, so that they are estimated from the texts.
    assert answer.json()["usage"]["completion_tokens"] == 12


def test_finished_choices_of_a_broken_stream_count(up: FakeUpstream, serve_upstream: Serve) -> None:
    """A deadline makes the call a stream. Four of eight choices finish before it breaks off."""
    up.behave = lambda _, __: "half_then_broken"
    answer = serve_upstream().chat({**BEST_OF_8, "budget": {"deadline_seconds": 20}})
    align = align_of(answer)
    assert (up.calls, align["dropped"], align["partial"]) == (1, 4, False)
    assert content_of(answer) == "candidate 9"
    errors = [each["error"] for each in align["candidates"] if each["error"]]
    assert all("broke off" in error for error in errors)
    assert up.until(lambda: up.running == 0)
