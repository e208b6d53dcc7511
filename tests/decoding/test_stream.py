"""Tests of choices assembled from stream chunks, and of choices that servers send."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.decoding.stream import (
    ChoiceBuilder,
    count_tokens,
    find_defect,
    message_delta,
    split_proportionally,
    token_count,
)

TEXT = st.text(max_size=12)
CALL = st.fixed_dictionaries(
    {
        "id": st.text(min_size=1, max_size=5),
        "name": st.sampled_from(["f", "aa", "lookup"]),
        "arguments": TEXT,
    }
)


def split(data: st.DataObject, text: str) -> list[str]:
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


@given(
    st.data(),
    TEXT,
    TEXT,
    st.lists(CALL, max_size=3),
    st.sampled_from(["stop", "length", "tool_calls"]),
    st.booleans(),
)
def test_a_chat_choice_is_assembled(
    data: st.DataObject, content: str, reasoning: str, calls: list[Any], reason: str, repeats: bool
) -> None:
    chunks: list[dict[str, Any]] = [
        {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    ]
    chunks += [{"delta": {"reasoning_content": piece}} for piece in split(data, reasoning)]
    chunks += [
        {
            "delta": {"content": piece},
            "logprobs": {"content": [{"token": piece, "logprob": -1.0}], "refusal": None},
        }
        for piece in split(data, content)
    ]
    for i, call in enumerate(calls):
        fixed = {"id": call["id"], "type": "function"}
        pieces = split(data, call["arguments"])
        for j, piece in enumerate(pieces):
            named = {"name": call["name"]} if j == 0 or repeats else {}
            head = fixed if j == 0 or repeats else {}
            chunks.append(
                {
                    "delta": {
                        "tool_calls": [
                            {"index": i, **head, "function": {**named, "arguments": piece}}
                        ]
                    }
                }
            )
    chunks.append({"delta": {}, "finish_reason": reason, "stop_reason": 5})
    original = deepcopy(chunks)
    builder = ChoiceBuilder("chat")
    deltas = [delta for chunk in chunks if (delta := builder.add({"index": 3, **chunk}))]
    assert chunks == original, "the chunks are not changed"
    choice = builder.choice()
    assert builder.finished
    assert choice["finish_reason"] == reason
    assert choice["stop_reason"] == 5
    message = choice["message"]
    assert message["role"] == "assistant"
    assert message["content"] == content
    assert (message.get("reasoning_content") or "") == reasoning
    expected = [
        {
            "id": c["id"],
            "type": "function",
            "function": {"name": c["name"], "arguments": c["arguments"]},
        }
        for c in calls
    ]
    assert message.get("tool_calls", []) == expected
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == content
    assert "".join(d["delta"].get("content", "") for d in deltas) == content
    assert all(
        "finish_reason" not in d and "index" not in d and "role" not in d["delta"] for d in deltas
    )


@given(st.data(), TEXT)
def test_a_completion_choice_is_assembled(data: st.DataObject, text: str) -> None:
    builder = ChoiceBuilder("completion")
    pieces = split(data, text)
    deltas = [
        builder.add({"index": 0, "text": p, "logprobs": {"tokens": [p], "token_logprobs": [-1.0]}})
        for p in pieces
    ]
    builder.add({"index": 0, "text": "", "finish_reason": "length"})
    choice = builder.choice()
    assert choice["text"] == text
    assert choice["logprobs"]["tokens"] == pieces
    assert choice["finish_reason"] == "length"
    assert "".join(d["text"] for d in deltas if d) == text


def test_unknown_fields_are_kept() -> None:
    builder = ChoiceBuilder("chat")
    delta = builder.add(
        {
            "index": 0,
            "delta": {"content": "a", "audio": {"id": "x", "data": "AA"}},
            "token_ids": [1],
            "new": {"a": 1},
        }
    )
    builder.add(
        {
            "index": 0,
            "delta": {"content": "b", "audio": {"data": "BB"}},
            "token_ids": [2],
            "finish_reason": "stop",
        }
    )
    assert delta == {
        "delta": {"content": "a", "audio": {"id": "x", "data": "AA"}},
        "token_ids": [1],
        "new": {"a": 1},
    }
    choice = builder.choice()
    assert choice["message"]["audio"] == {"id": "x", "data": "AABB"}
    assert choice["token_ids"] == [1, 2]
    assert choice["new"] == {"a": 1}


def test_a_chunk_without_text_is_no_delta() -> None:
    builder = ChoiceBuilder("chat")
    assert builder.add({"delta": {"role": "assistant", "content": ""}}) is None
    assert builder.add({"delta": {}, "finish_reason": "stop"}) is None
    assert builder.choice()["message"] == {"role": "assistant", "content": ""}
    empty = ChoiceBuilder("chat")
    assert empty.choice("length") == {
        "message": {"role": "assistant", "content": None},
        "logprobs": None,
        "finish_reason": "length",
    }


def test_a_complete_choice_is_returned_and_is_one_delta() -> None:
    builder = ChoiceBuilder("chat")
    message = {
        "role": "assistant",
        "content": "a",
        "refusal": None,
        "tool_calls": [{"id": "x"}, {"id": "y"}],
    }
    delta = builder.set_complete(
        {"index": 4, "message": message, "logprobs": None, "finish_reason": "stop", "extra": 1}
    )
    assert builder.choice() == {
        "message": message,
        "logprobs": None,
        "finish_reason": "stop",
        "extra": 1,
    }
    assert delta["delta"] == {
        "content": "a",
        "tool_calls": [{"index": 0, "id": "x"}, {"index": 1, "id": "y"}],
    }
    assert delta["extra"] == 1


@given(st.integers(0, 10**6), st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_a_split_adds_up_and_is_fair(total: int, weights: list[int]) -> None:
    parts = split_proportionally(total, weights)
    assert sum(parts) == total
    assert len(parts) == len(weights)
    effective = weights if any(weights) else [1] * len(weights)
    fair = [total * weight / sum(effective) for weight in effective]
    assert all(abs(part - exact) <= 1 for part, exact in zip(parts, fair, strict=True))
    assert all(part >= 0 for part in parts)


def test_tokens_are_counted_by_logprobs_or_by_characters() -> None:
    assert (
        count_tokens({"message": {"content": "abcdef"}, "logprobs": {"content": [{}, {}, {}]}}) == 3
    )
    assert count_tokens({"text": "abc", "logprobs": {"tokens": ["a"]}}) == 1
    assert count_tokens({"message": {"role": "assistant", "content": "x" * 50}}) == 13
    assert (
        count_tokens(
            {"message": {"role": "assistant", "content": "x", "reasoning_content": "y" * 40}}
        )
        == 11
    )
    assert (
        count_tokens(
            {"message": {"role": "assistant", "content": None, "tool_calls": [{"id": "x" * 40}]}}
        )
        > 10
    )
    assert count_tokens({"text": "abc", "logprobs": None}) == 1
    assert (
        count_tokens({"text": ""})
        == count_tokens({"message": {"role": "assistant", "content": None}})
        == 0
    )


@pytest.mark.parametrize("value", [True, "3", 1.5, -1, 2.0**40, math.nan, math.inf, None, [3]])
def test_a_wrong_count_is_none(value: object) -> None:
    assert token_count(value) is None


@pytest.mark.parametrize(
    ("kind", "choice", "words"),
    [
        ("chat", {}, "message"),
        ("chat", {"message": None}, "message"),
        ("chat", {"message": "hello"}, "message"),
        ("chat", {"message": {"content": 7}}, "text"),
        ("chat", {"message": {"tool_calls": "f()"}}, "tool calls"),
        ("chat", {"message": {}, "logprobs": [1]}, "logprobs"),
        ("chat", {"message": {}, "finish_reason": {}}, "finish_reason"),
        ("chat", {"message": {}, "logprobs": {"content": [{"logprob": -math.inf}]}}, "JSON"),
        ("chat", {"message": {"content": "\ud800"}}, "JSON"),
        ("completion", {}, "text"),
        ("completion", {"text": None}, "text"),
        ("completion", {"text": "x", "score": math.nan}, "JSON"),
    ],
)
def test_a_choice_with_a_defect_is_described(kind: Any, choice: dict[str, Any], words: str) -> None:
    assert words in (find_defect(kind, choice) or "")


@pytest.mark.parametrize(
    "piece",
    [
        {"delta": "text"},
        {"delta": {"content": 3}},
        {"delta": {"content": "\udc00"}},
        {"delta": {}, "logprobs": 1},
    ],
)
def test_a_chunk_with_a_defect_is_described(piece: dict[str, Any]) -> None:
    assert find_defect("chat", piece, streamed=True)


def test_proper_choices_and_chunks_have_no_defect() -> None:
    for choice in (
        {"message": {"content": "x"}},
        {"message": {"content": None, "tool_calls": [{}]}, "logprobs": None, "new": [1]},
    ):
        assert find_defect("chat", choice) is None
    for piece in (
        {},
        {"delta": None},
        {"delta": {}, "finish_reason": "stop"},
        {"delta": {"content": "\U0001f989"}},
    ):
        assert find_defect("chat", piece, streamed=True) is None
    assert (
        find_defect("completion", {"text": ""})
        is find_defect("completion", {"text": None}, streamed=True)
        is None
    )


def test_only_sensible_token_counts_are_accepted() -> None:
    assert [token_count(value) for value in (0, 7, -1, True, "7", None, 1.5, 10**400)] == [
        0,
        7,
        *[None] * 6,
    ]


def test_a_finished_message_is_a_delta_with_numbered_tool_calls() -> None:
    message = {"role": "assistant", "content": "", "refusal": None, "tool_calls": [{"id": "x"}]}
    assert message_delta(message) == {"content": "", "tool_calls": [{"index": 0, "id": "x"}]}
    assert message["tool_calls"] == [{"id": "x"}], "the message itself stays unchanged"
