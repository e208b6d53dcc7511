"""Streams are read as they come, wherever they are split."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align_bench.events import Answer, StreamFailed

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
STREAM = (
    b": comment\n\n"
    + b"".join(b"data: " + json.dumps(c).encode() + b"\r\n\r\n" for c in CHUNKS)
    + b"data: [DONE]\n\n"
)


@given(st.lists(st.integers(1, 60), max_size=40))
def test_split_anywhere(sizes: list[int]) -> None:
    answer, rest, now = Answer(), STREAM, 0.0
    for size in [*sizes, len(STREAM)]:
        now += 1.0
        answer.feed(rest[:size], now)
        rest = rest[size:]
    answer.end()
    assert answer.chunks == 3
    assert answer.first is not None
    assert len(answer.gaps) == 2
    assert answer.tokens() == (3, 7, 7)
    assert answer.align_usage() == {"engine_calls": 2}
    assert answer.finish_reason == "stop"


def test_times_are_those_of_content() -> None:
    answer = Answer()
    for now, chunk in enumerate(CHUNKS):
        answer.feed(b"data: " + json.dumps(chunk).encode() + b"\n\n", 10.0 + now**2)
    assert answer.first == 11.0, "a chunk with the role only is no token"
    assert answer.gaps == [3.0, 5.0]


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
def test_returned_tokens(details: Any, returned: int) -> None:
    answer = Answer()
    answer.whole(
        {
            "choices": [{}],
            "usage": {
                "prompt_tokens": 1,
                "completion_tokens": 7,
                "completion_tokens_details": details,
            },
        }
    )
    assert answer.tokens() == (1, 7, returned)


def test_an_endpoint_that_does_not_count() -> None:
    answer = Answer()
    answer.whole({"choices": [{"finish_reason": "stop"}], "usage": None})
    assert answer.tokens() == (None, None, None)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"data: {oops\n\n", "not JSON"),
        (b"data: [1]\n\n", "not JSON"),
        (
            b'data: {"error": {"message": "no", "code": "engine_failed"}}\n\n',
            "error event engine_failed",
        ),
        (b'data: {"error": "no"}\n\n', "error event"),
    ],
)
def test_what_is_wrong_with_a_stream(data: bytes, kind: str) -> None:
    with pytest.raises(StreamFailed) as caught:
        Answer().feed(data, 0.0)
    assert caught.value.kind == kind


def test_a_stream_that_breaks_off() -> None:
    answer = Answer()
    answer.feed(b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n', 0.0)
    with pytest.raises(StreamFailed, match="without a finish_reason"):
        answer.end()
