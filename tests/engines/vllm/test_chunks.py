"""A streamed choice, parsed and assembled. Needs no vLLM."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.engines.vllm.chunks import StreamedChoice, parse_chunks
from infer_align.errors import InvalidRequest


def chunk(index: int = 0, **choice: object) -> dict[str, object]:
    return {"choices": [{"index": index, **choice}]}


@given(st.lists(st.text(max_size=5), max_size=8), st.sampled_from(["content", "reasoning"]))
def test_texts_are_joined(texts: list[str], field: str) -> None:
    streamed = StreamedChoice("chat")
    usage = {"prompt_tokens": 3, "completion_tokens": len(texts)}
    deltas = [streamed.add(chunk(delta={"role": "assistant", "content": ""}))]
    deltas += [streamed.add(chunk(delta={field: text})) for text in texts]
    deltas.append(streamed.add(chunk(delta={}, finish_reason="stop", stop_reason=7)))
    deltas.append(streamed.add({"choices": [], "usage": usage}))
    assert "".join(delta["delta"][field] for delta in deltas if delta) == "".join(texts)
    assert (streamed.choice["message"][field] or "") == "".join(texts)
    assert streamed.choice["finish_reason"] == "stop"
    assert streamed.choice["stop_reason"] == 7
    assert streamed.usage == usage


def test_tool_calls_are_joined() -> None:
    streamed = StreamedChoice("chat")
    look_up = {"name": "look_up", "arguments": ""}
    count = {"name": "count", "arguments": "{}"}
    calls: list[dict[str, Any]] = [
        {"index": 0, "id": "a", "type": "function", "function": look_up},
        {"index": 0, "function": {"arguments": '{"x":'}},
        {"index": 1, "id": "b", "type": "function", "function": count},
        {"index": 0, "function": {"arguments": "1}"}},
    ]
    for call in calls:
        delta = {"tool_calls": [call]}
        assert streamed.add(chunk(delta=delta)) == {"delta": delta}
    assert streamed.choice["message"]["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "look_up", "arguments": '{"x":1}'}},
        {"id": "b", "type": "function", "function": {"name": "count", "arguments": "{}"}},
    ]


@pytest.mark.parametrize(
    ("kind", "first", "second", "joined"),
    [
        ("chat", {"content": [1]}, {"content": [2, 3]}, {"content": [1, 2, 3]}),
        (
            "completion",
            {"tokens": ["a"], "text_offset": [0]},
            {"tokens": ["b"], "text_offset": [1]},
            {"tokens": ["a", "b"], "text_offset": [0, 1]},
        ),
    ],
)
def test_logprobs_are_joined(kind: Any, first: Any, second: Any, joined: Any) -> None:
    streamed = StreamedChoice(kind)
    text: dict[str, object] = {"delta": {"content": "x"}} if kind == "chat" else {"text": "x"}
    for logprobs in (first, second):
        streamed.add(chunk(logprobs=logprobs, **text))
    choice = streamed.choice
    assert choice["logprobs"] == joined
    assert (choice["message"]["content"] if kind == "chat" else choice["text"]) == "xx"


async def events(*texts: str) -> AsyncIterator[str]:
    for text in texts:
        yield text


@pytest.mark.anyio
async def test_events_are_parsed_up_to_the_end() -> None:
    first, second = chunk(delta={"content": "é"}), chunk(delta={"content": "b"})
    stream = events(
        f"data: {json.dumps(first)}\n\n",
        ": a comment\n\n",
        f"data: {json.dumps(second, ensure_ascii=False)}\n\n",
        "data: [DONE]\n\n",
    )
    assert [item async for item in parse_chunks(stream)] == [first, second]


@pytest.mark.anyio
async def test_an_error_in_the_stream_is_raised() -> None:
    error = {"error": {"message": "too hot", "type": "x", "param": "temperature", "code": 400}}
    stream = events(f"data: {json.dumps(error)}\n\n", "data: [DONE]\n\n")
    with pytest.raises(InvalidRequest, match="too hot") as caught:
        _ = [item async for item in parse_chunks(stream)]
    assert caught.value.param == "temperature"
