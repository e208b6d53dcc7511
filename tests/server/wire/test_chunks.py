"""The chunks of a stream: each field once, the report and the usage in the last chunk."""

from __future__ import annotations

import json
from typing import Any

import pytest

from infer_align.config.align import parse_align
from infer_align.errors import Unavailable
from infer_align.flow.plan import Plan
from infer_align.flow.request import Request
from infer_align.flow.response import Response, Timing
from infer_align.types import Candidate, Delta, Draw, Kind, Scores, Selection
from infer_align_server.wire.chunks import DONE, ChunkWriter

HEAD = {"id": "x-1", "created": 1, "model": "owl"}


def request_of(kind: Kind = "chat", align: Any = None) -> Request:
    if align is None:
        return Request({"prompt": "hi"}, kind)
    return Request({"prompt": "hi"}, kind, align=parse_align(align), aligned=True)


def writer(request: Request, *, deltas: bool = True, usage: bool = False) -> ChunkWriter:
    return ChunkWriter(request, HEAD, streams_deltas=deltas, include_usage=usage)


def respond(request: Request, choice: dict[str, Any]) -> Response:
    candidate = Candidate(0, choice, prompt_tokens=5, completion_tokens=2)
    selection = Selection((0,), (0.0,), {}, {}, "the only one")
    plan = Plan((Draw({}),), request=request)
    return Response(plan, (candidate,), Scores(), selection, Timing(0.0, 0.0, 0.0))


def chunks_of(events: bytes) -> list[dict[str, Any]]:
    lines = [line for line in events.decode().split("\n\n") if line]
    return [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]


def test_the_role_is_sent_once_per_choice() -> None:
    out = writer(request_of())
    events = b"".join(
        out.delta(Delta(index, {"delta": {"content": text}}))
        for index, text in [(0, "a"), (1, "b"), (0, "c")]
    )
    deltas = [chunk["choices"][0] for chunk in chunks_of(events)]
    assert [(c["index"], c["delta"].get("role")) for c in deltas if "role" in c["delta"]] == [
        (0, "assistant"),
        (1, "assistant"),
    ]
    assert [c["delta"]["content"] for c in deltas if "role" not in c["delta"]] == ["a", "b", "c"]


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"content": "mice"}, ""),
        ({"content": "", "tool_calls": []}, ""),
        ({"content": "Wait.", "tool_calls": [CALL]}, ""),
        ({"content": None, "tool_calls": [CALL]}, None),
        ({"content": "", "tool_calls": [CALL]}, None),
        ({"tool_calls": [CALL]}, None),
        ({"content": None, "function_call": CALL["function"]}, None),
    ],
)
def test_the_content_is_null_where_a_message_begins_with_a_call(message: Any, content: Any) -> None:
    choice = {"message": {"role": "assistant", **message}, "finish_reason": "stop"}
    streams = [writer(request_of()).delta(Delta(0, {"delta": message}))]
    for align, deltas in ((None, True), ({"best_of_n": {"n": 2}}, False)):
        request = request_of(align=align)
        streams.append(writer(request, deltas=deltas).ending([respond(request, choice)]))
    for events in streams:
        first = chunks_of(events)[0]["choices"][0]["delta"]
        assert first == {"role": "assistant", "content": content}


def test_text_completions_have_no_role() -> None:
    out = writer(request_of("completion"))
    (chunk,) = chunks_of(out.delta(Delta(0, {"text": "a"})))
    assert chunk["object"] == "text_completion"
    assert chunk["choices"][0]["text"] == "a"


def test_a_field_of_the_engine_is_sent_once() -> None:
    request = request_of("completion")
    out = writer(request)
    out.delta(Delta(0, {"text": "a", "token_ids": [5]}))
    choice = {"text": "a", "finish_reason": "stop", "token_ids": [5], "stop_reason": 7}
    (final,) = chunks_of(out.ending([respond(request, choice)]))
    assert final["choices"][0]["finish_reason"] == "stop"
    assert final["choices"][0]["stop_reason"] == 7
    assert "token_ids" not in final["choices"][0]


def test_a_selected_candidate_is_sent_complete() -> None:
    request = request_of(align={"best_of_n": {"n": 2}})
    message = {"role": "assistant", "content": "mice", "tool_calls": [{"id": "c"}]}
    response = respond(request, {"message": message, "finish_reason": "stop", "logprobs": None})
    role, content, final = chunks_of(writer(request, deltas=False).ending([response]))
    assert role["choices"][0]["delta"]["role"] == "assistant"
    assert content["choices"][0]["delta"]["content"] == "mice"
    assert content["choices"][0]["finish_reason"] is None
    assert final["choices"][0]["finish_reason"] == "stop"
    assert "align" in final
    assert "align" not in content


@pytest.mark.parametrize("align", [None, {"best_of_n": {"n": 2}}])
def test_the_usage_is_a_chunk_of_its_own_at_the_end(align: Any) -> None:
    request = request_of("completion", align)
    out = writer(request, usage=True)
    events = out.delta(Delta(0, {"text": "a"}))
    events += out.ending([respond(request, {"text": "a", "finish_reason": "stop"})])
    assert events.endswith(DONE)
    *others, last = chunks_of(events)
    assert [chunk["usage"] for chunk in others] == [None, None]
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 7
    assert ("align" in last) == (align is not None)


def test_an_error_ends_the_stream_in_openais_shape() -> None:
    (event,) = chunks_of(writer(request_of()).error(Unavailable("the engine died")))
    assert event["error"]["message"] == "the engine died"
