"""The timeout that OpenAI's SDKs send is the deadline of a request that sets none."""

from __future__ import annotations

import threading
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align_server.limits.client_timeout import (
    MAX_RESERVED_SECONDS,
    client_deadline,
    client_timeout,
)

pytestmark = pytest.mark.slow

WORDS = " ".join(str(i) for i in range(1, 4001))
# It takes minutes. A deadline of a few seconds leaves a part of it.
SLOW = f'[engine]\nkind = "fake"\nreplies = [{{text = "{WORDS}", seconds_per_token = 0.05}}]\n'
# It ends at once.
FAST = '[engine]\nkind = "fake"\nreplies = [{text = "1 2 3 4 5 6 7 8"}]\n'
CHAT = "/v1/chat/completions"
USER: Any = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"x-stainless-read-timeout": "600"}, 600.0),
        ({"x-stainless-read-timeout": "1.5"}, 1.5),
        ({"x-stainless-timeout": "30", "x-stainless-read-timeout": "600"}, 30.0),
        ({"x-stainless-timeout": "none", "x-stainless-read-timeout": "5"}, 5.0),
        *[
            ({"x-stainless-read-timeout": text}, None)
            for text in ("", "None", "0", "-1", "nan", "inf", "1e999", "5 s", "NOT_GIVEN")
        ],
    ],
)
def test_the_smallest_valid_timeout_counts(headers: dict[str, str], seconds: float | None) -> None:
    assert client_timeout(headers) == seconds


@given(st.text())
def test_any_header_is_parsed(text: str) -> None:
    seconds = client_timeout({"x-stainless-read-timeout": text})
    assert seconds is None or seconds > 0


@given(st.floats(1e-3, 1e6))
def test_the_deadline_is_a_little_earlier(seconds: float) -> None:
    due = client_deadline(None, seconds)
    assert due is not None
    assert 0 < due < seconds
    assert seconds - due <= MAX_RESERVED_SECONDS
    assert client_deadline(None, None) is None
    assert client_deadline(4.5, seconds) == 4.5, "a deadline that is there stands"


def client(live: Any, timeout: float) -> openai.OpenAI:
    return openai.OpenAI(base_url=live.base_url, api_key="unused", max_retries=0, timeout=timeout)


def test_the_sdk_announces_its_timeout(serve: Any) -> None:
    with client(serve(FAST), 90.0) as sdk:
        create = sdk.chat.completions.with_raw_response.create
        sent = create(model="fake", messages=USER).http_request.headers
    assert client_timeout(sent) == 90.0


def test_a_partial_answer_comes_before_the_clients_timeout(serve: Any) -> None:
    # The client of the test is patient, so a busy machine breaks nothing.
    live = serve(SLOW)
    answer = live.post({"messages": USER}, headers={"x-stainless-read-timeout": "3"})
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith("1 2")
    assert live.idle()


def test_the_requests_own_deadline_counts(serve: Any) -> None:
    live = serve(SLOW)
    with client(live, 60) as sdk:
        body = {"align": {"budget": {"deadline_seconds": 0.7}}}
        answer: Any = sdk.chat.completions.create(model="fake", messages=USER, extra_body=body)
    assert answer.align["partial"] is True


def test_a_stream_is_kept_alive_for_its_client(serve: Any, hold: threading.Event) -> None:
    # Without the client's timeout there would be no comment for an hour.
    live = serve(
        f"[server]\nkeepalive_seconds = 3600\n{FAST}"
        '[rewards.hanging]\nkind = "callable"\nfunction = "tests.server.scorers:hanging"\n'
    )
    body = {"messages": USER, "stream": True, "align": {"best_of_n": {"n": 2}}}
    headers = {"x-stainless-read-timeout": "1"}
    lines: list[str] = []
    with live.http() as http, http.stream("POST", CHAT, json=body, headers=headers) as answer:
        for line in answer.iter_lines():
            lines.append(line)
            if len([each for each in lines if each.startswith(":")]) == 3:
                hold.set()
    assert "data: [DONE]" in lines


def test_a_tiny_timeout_does_not_cause_a_flood_of_comments(serve: Any) -> None:
    live = serve('[engine]\nkind = "fake"\nreplies = [{text = "1 2", first_token_seconds = 2}]\n')
    answer = live.post(
        {"messages": USER, "stream": True}, headers={"x-stainless-read-timeout": "1e-9"}
    )
    assert 1 <= answer.text.count(": candidates") <= 10
    assert answer.text.endswith("data: [DONE]\n\n")


def test_the_client_timeout_can_be_switched_off(serve: Any) -> None:
    live = serve(f"[server]\nhonour_client_timeout = false\n{FAST}")
    answer = live.post({"messages": USER}, headers={"x-stainless-read-timeout": "1e-6"})
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
