"""An answer collects its events however the network splits them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align_bench.answer import Answer, StreamFailed

CHUNKS: list[dict[str, Any]] = [
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"index": 0, "delta": {"content": "héllo"}}]},
    {"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]},
    {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0}]}}]},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {
        "choices": [],
        "usage": {"prompt_tokens": 3, "completion_tokens": 7},
        "align": {"usage": {"engine_calls": 2, "odd": "x"}},
    },
]
EVENTS = b"".join(b"data: " + json.dumps(chunk).encode() + b"\r\n\r\n" for chunk in CHUNKS)
STREAM = b": comment\n\n" + EVENTS + b"data: [DONE]\n\n"


@given(st.lists(st.integers(1, 60), max_size=40))
def test_a_stream_may_be_split_anywhere(sizes: list[int]) -> None:
    answer = Answer()
    remaining = STREAM
    for now, size in enumerate([*sizes, len(STREAM)]):
        answer.feed(remaining[:size], float(now))
        remaining = remaining[size:]
    answer.end(100.0)
    assert answer.chunks == 3
    assert answer.first is not None
    assert len(answer.gaps) == 2
    assert answer.tokens() == (3, 7, 7)
    assert answer.align_usage() == {"engine_calls": 2}
    assert answer.finish_reason == "stop"


def test_only_content_has_a_time() -> None:
    answer = Answer()
    for now, chunk in enumerate(CHUNKS):
        answer.feed(b"data: " + json.dumps(chunk).encode() + b"\n\n", 10.0 + now**2)
    assert answer.first == 11.0, "a chunk with the role only has no content"
    assert answer.gaps == [3.0, 5.0]


def test_the_last_event_needs_no_empty_line() -> None:
    answer = Answer()
    answer.feed(b'data: {"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}', 1.0)
    answer.end(2.0)
    assert (answer.first, answer.chunks, answer.finish_reason) == (2.0, 1, "stop")


@pytest.mark.parametrize(
    ("details", "returned"),
    [
        ({"accepted_prediction_tokens": 2, "rejected_prediction_tokens": 5}, 2),
        ({"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}, 7),
        ({"accepted_prediction_tokens": None, "reasoning_tokens": 3}, 7),
        ({"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 1}, 7),
        (None, 7),
    ],
)
def test_accepted_tokens_count_as_returned_if_they_add_up(details: Any, returned: int) -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 7, "completion_tokens_details": details}
    answer = Answer()
    answer.read_body({"choices": [{}], "usage": usage})
    assert answer.tokens() == (1, 7, returned)


def test_without_usage_no_tokens_are_counted() -> None:
    answer = Answer()
    answer.read_body({"choices": [{"finish_reason": "stop"}], "usage": None})
    assert answer.tokens() == (None, None, None)


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (b"{oops", "not JSON"),
        (b"[1]", "not JSON"),
        (b'{"error": {"message": "no", "code": "engine_failed"}}', "error event engine_failed"),
        (b'{"error": "no"}', "error event"),
    ],
)
def test_a_wrong_event_fails_the_stream(event: bytes, kind: str) -> None:
    with pytest.raises(StreamFailed) as caught:
        Answer().feed(b"data: " + event + b"\n\n", 0.0)
    assert caught.value.kind == kind


def test_a_stream_without_its_end_fails() -> None:
    answer = Answer()
    answer.feed(b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n', 0.0)
    with pytest.raises(StreamFailed, match="without a finish_reason"):
        answer.end(1.0)
