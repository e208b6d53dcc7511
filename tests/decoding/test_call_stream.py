"""Tests of tool calls found in text, in whichever pieces it arrives."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from infer_align.decoding.call_format import HERMES, INSTRUCTED, LLAMA, MISTRAL, CallFormat
from infer_align.decoding.call_stream import CallStream
from infer_align.decoding.stream import ChoiceBuilder
from infer_align.decoding.tools import read_tools

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
CITY = '{"city": "Oslo \\"}{ \\\\", "deep": {"a": [1, {}]}}'


def stream(form: CallFormat, **fields: Any) -> CallStream:
    request = read_tools({"tools": TOOLS, **fields})
    assert request is not None
    return CallStream(request, form, lambda index: f"id{index}")


def outcome(calls: CallStream, pieces: list[str]) -> tuple[str | None, list[tuple[str, str]]]:
    """Feed the pieces; check that the deltas add up to the message; return content and calls."""
    builder = ChoiceBuilder("chat")
    for piece in pieces:
        builder.add({"index": 0, "delta": calls.push(piece)})
    builder.add({"index": 0, "delta": calls.finish("")})
    message = calls.message()
    built = builder.choice("stop")["message"]
    assert (built["content"] or "") == (message["content"] or "")
    assert built.get("tool_calls") == message.get("tool_calls")
    made = message.get("tool_calls", [])
    assert [call["id"] for call in made] == [f"id{i}" for i in range(len(made))]
    functions = [call["function"] for call in made]
    return message["content"], [(f["name"], f["arguments"]) for f in functions]


def head(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


CALL_F = head("f", CITY)
CALL_G = head("g", "{}")
CASES: dict[str, tuple[CallFormat, str, str | None, list[tuple[str, str]]]] = {
    "hermes": (HERMES, f"<tool_call>\n{CALL_F}\n</tool_call>", None, [("f", CITY)]),
    "no end": (HERMES, f"<tool_call>{CALL_F}", None, [("f", CITY)]),
    "text before": (
        HERMES,
        f"I look. \n\n<tool_call>\n{CALL_F}\n</tool_call>\n",
        "I look.",
        [("f", CITY)],
    ),
    "two": (
        HERMES,
        f"<tool_call>\n{CALL_F}\n</tool_call>\n<tool_call>\n{CALL_G}\n</tool_call>",
        None,
        [("f", CITY), ("g", "{}")],
    ),
    "two, glued": (
        HERMES,
        f"<tool_call>{CALL_F}</tool_call><tool_call>{CALL_G}</tool_call>",
        None,
        [("f", CITY), ("g", "{}")],
    ),
    "one only": (
        INSTRUCTED,
        f"<tool_call>\n{CALL_F}\n</tool_call>\n<tool_call>\n{CALL_G}\n</tool_call>",
        None,
        [("f", CITY)],
    ),
    "other order": (
        HERMES,
        '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>',
        None,
        [("f", '{"a": 1}')],
    ),
    "white space": (
        HERMES,
        '<tool_call>\n{ "name" : "f" , "arguments" : {"a" : 1} }\n</tool_call>',
        None,
        [("f", '{"a" : 1}')],
    ),
    "arguments as text": (
        HERMES,
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        None,
        [("f", '{"a": 1}')],
    ),
    "cut": (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "b', None, [("f", '{"a": "b')]),
    "cut early": (HERMES, '<tool_call>\n{"name": "f', '<tool_call>\n{"name": "f', []),
    "no call": (HERMES, "a <tool_call>me maybe</tool_call> b", None, []),
    "half a marker": (HERMES, "a <tool_ca", "a <tool_ca", []),
    "no name": (HERMES, '<tool_call>{"a": 1}', '<tool_call>{"a": 1}', []),
    "plain": (HERMES, " plain text \n", " plain text \n", []),
    "empty": (HERMES, "", "", []),
    "mistral": (
        MISTRAL,
        f"[TOOL_CALLS] [{CALL_F}, {CALL_G}]",
        None,
        [("f", CITY), ("g", "{}")],
    ),
    "mistral, glued": (MISTRAL, f"[TOOL_CALLS][{CALL_F}]", None, [("f", CITY)]),
    "llama": (LLAMA, head("f", CITY, "parameters"), None, [("f", CITY)]),
    "llama, text": (LLAMA, "It is {cold}.", "It is {cold}.", []),
    "llama, other object": (LLAMA, '{"answer": 4}', '{"answer": 4}', []),
}
CASES["no call"] = (HERMES, CASES["no call"][1], CASES["no call"][1], [])


@pytest.mark.parametrize("name", CASES)
def test_calls_are_found_in_whichever_pieces_the_text_arrives(name: str) -> None:
    form, text, content, calls = CASES[name]
    generator = random.Random(7)
    for _ in range(30):
        pieces = []
        rest = text
        while rest:
            length = generator.choice([1, 1, 2, 3, 7, 40])
            pieces.append(rest[:length])
            rest = rest[length:]
        assert outcome(stream(form), pieces) == (content, calls)
    assert outcome(stream(form), [text]) == (content, calls)


def test_arguments_are_streamed_as_they_arrive() -> None:
    calls = stream(HERMES)
    assert calls.push('<tool_call>\n{"name": "f", ') == {}
    delta = calls.push('"arguments": {"a"')
    (piece,) = delta["tool_calls"]
    assert piece["function"] == {"name": "f", "arguments": '{"a"'}
    assert (piece["index"], piece["id"], piece["type"]) == (0, "id0", "function")
    delta = calls.push(": 1}}")
    assert delta == {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}
    assert calls.push("\n</tool_call>") == {}


def test_content_is_streamed_while_no_call_is_announced() -> None:
    calls = stream(HERMES)
    assert calls.push("one two") == {"content": "one two"}
    assert calls.push(" <tool") == {}
    assert calls.push("box> three") == {"content": " <toolbox> three"}


def test_the_arguments_of_a_named_tool_are_the_whole_text() -> None:
    choice = {"type": "function", "function": {"name": "g"}}
    calls = stream(HERMES, tool_choice=choice)
    first = calls.push("")["tool_calls"][0]
    assert first["function"] == {"name": "g", "arguments": ""}
    assert outcome(stream(HERMES, tool_choice=choice), list('{"a": 1}')) == (
        None,
        [("g", '{"a": 1}')],
    )
    assert calls.finish_reason("stop") == "stop"


def test_a_required_call_begins_behind_its_marker() -> None:
    calls = stream(HERMES, tool_choice="required")
    assert outcome(calls, [*CALL_F, "\n</tool_call>"]) == (None, [("f", CITY)])
    assert calls.finish_reason("stop") == "tool_calls"
    assert calls.finish_reason("length") == "length"


def test_without_parallel_calls_the_second_is_left_out() -> None:
    calls = stream(HERMES, parallel_tool_calls=False)
    text = f"<tool_call>\n{CALL_F}\n</tool_call>\n<tool_call>\n{CALL_G}\n</tool_call>"
    assert outcome(calls, [text]) == (None, [("f", CITY)])


def test_arguments_are_valid_json_where_the_text_is() -> None:
    for name, (form, text, _, calls) in CASES.items():
        for _, arguments in calls:
            if name != "cut":
                json.loads(arguments)
        assert outcome(stream(form), list(text))[1] == calls
