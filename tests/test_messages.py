"""Messages are read in one way, whatever their form: as text, and by chat templates."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from typing import Any

import pytest

from infer_align.added_text import append_text, prepend_text
from infer_align.messages import (
    calls_as_text,
    message_text,
    normalize,
    render,
    text_of,
    text_with_placeholders,
    transcript,
)
from infer_align.rewards._conversation import turns
from infer_align.types import Candidate

IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
PARTS = [{"type": "text", "text": "Look: "}, IMAGE, {"type": "text", "text": "nice"}]
REFUSAL = {"type": "refusal", "refusal": "no"}
QUESTION = {"role": "user", "content": "Weather?"}


def call(name: str = "weather", arguments: object = '{"city": "Paris"}', **fields: object) -> dict:
    function = {"name": name, "arguments": arguments}
    return {"id": "1", "type": "function", "function": function, **fields}


def custom(text: str | None) -> dict:
    return {"id": "2", "type": "custom", "custom": {"name": "sql", "input": text}}


def calling(*calls: dict, content: object = None) -> dict:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def typed(kind: str, text: str) -> dict[str, str]:
    return {"type": kind, "text": text}


def part(text: str) -> dict[str, str]:
    return typed("text", text)


@pytest.mark.parametrize(
    ("content", "prepended", "appended"),
    [
        (None, "new", "new"),
        ("", "new", "new"),
        ("old", "new\n\nold", "old\n\nnew"),
        # A part of its own would get a line break of vLLM's.
        ([part("old")], [part("new\n\nold")], [part("old\n\nnew")]),
        (
            [part("a"), part("b")],
            [part("new\n\na"), part("b")],
            [part("a"), part("b\n\nnew")],
        ),
        (
            [{**part("old"), "cache_control": {}}],
            [{**part("new\n\nold"), "cache_control": {}}],
            [{**part("old\n\nnew"), "cache_control": {}}],
        ),
        # Every type of part that holds text is joined, in its own field.
        (
            [typed("input_text", "a")],
            [typed("input_text", "new\n\na")],
            [typed("input_text", "a\n\nnew")],
        ),
        (
            [typed("output_text", "a")],
            [typed("output_text", "new\n\na")],
            [typed("output_text", "a\n\nnew")],
        ),
        ([REFUSAL], [{**REFUSAL, "refusal": "new\n\nno"}], [{**REFUSAL, "refusal": "no\n\nnew"}]),
        # What is empty needs no break, as "" needs none.
        ([], [part("new")], [part("new")]),
        ([part("")], [part("new")], [part("new")]),
        ([typed("input_text", ""), part("")], [part("new")], [part("new")]),
        ([part(""), part("a")], [part("new\n\na")], [part(""), part("a\n\nnew")]),
        ([part("a"), part("")], [part("new\n\na"), part("")], [part("a\n\nnew")]),
        ([IMAGE, part("")], [part("new\n\n"), IMAGE, part("")], [IMAGE, part("\n\nnew")]),
        ([IMAGE], [part("new\n\n"), IMAGE], [IMAGE, part("\n\nnew")]),
        (PARTS, [part("new\n\nLook: "), *PARTS[1:]], [*PARTS[:2], part("nice\n\nnew")]),
    ],
)
def test_a_text_is_added_to_the_content(content: Any, prepended: Any, appended: Any) -> None:
    before = copy.deepcopy(content)
    assert prepend_text("new", content) == prepended
    assert append_text(content, "new") == appended
    assert content == before


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("the cat", "the cat"),
        ("", ""),
        (None, ""),
        ([], ""),
        (PARTS, "Look: nice"),
        ([{"type": "text"}, {"type": "text", "text": None}, "stray", 5], ""),
        ([{"type": "refusal", "refusal": "no"}, {"type": "text", "text": "!"}], "no!"),
        ([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "yes"}], "yes"),
        ([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}], "ab"),
    ],
)
def test_text_is_the_string_or_the_joined_text_parts(content: object, text: str) -> None:
    assert text_of(content) == text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("the cat", "the cat"),
        (None, ""),
        (PARTS, "Look: [image_url]nice"),
        ([{"no": "type"}], "[None]"),
        ([{"type": "thinking", "thinking": "hm"}], ""),
        ([{"type": "refusal", "refusal": "no"}], "no"),
    ],
)
def test_a_placeholder_stands_for_a_part_that_is_not_text(content: object, text: str) -> None:
    assert text_with_placeholders(content) == text


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "yes"}, "yes"),
        ({"content": None, "refusal": "I cannot."}, "I cannot."),
        ({"content": "yes", "refusal": None, "tool_calls": None}, "yes"),
        ({"content": None, "audio": {"data": "AA", "transcript": "It is late."}}, "It is late."),
        ({"content": "read", "audio": {"transcript": "said"}}, "read"),
        ({"content": "", "refusal": "No.", "audio": {"transcript": "said"}}, "No."),
        ({"content": None, "audio": {"id": "earlier"}}, ""),
        ({"content": None, "audio": {"transcript": 5}}, ""),
        (calling(call()), 'weather({"city": "Paris"})'),
        (calling(call(arguments={"city": "Köln"})), 'weather({"city": "Köln"})'),
        (calling(call(arguments="")), "weather()"),
        (calling(call(arguments=None)), "weather({})"),
        (calling(call(arguments="{}")), "weather({})"),
        (calling(call(arguments='{"city":')), 'weather({"city":)'),
        (
            calling(call(), call("time"), content="Let me see."),
            'Let me see.\nweather({"city": "Paris"})\ntime({"city": "Paris"})',
        ),
        ({"function_call": {"name": "old", "arguments": "{}"}}, "old({})"),
        (calling({"id": "broken"}), ""),
        (calling(custom("select 1")), 'sql({"input": "select 1"})'),
        (calling(custom(None), call()), 'sql({"input": null})\nweather({"city": "Paris"})'),
        (calling({"type": "custom", "custom": "sql"}), ""),
    ],
)
def test_a_message_is_its_content_and_its_calls(message: dict, text: str) -> None:
    assert message_text(message) == text


def test_a_transcript_names_the_roles_of_several_messages() -> None:
    user = {"role": "user", "content": PARTS}
    text = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assistant = {"role": "assistant", "content": text}
    assert transcript([]) == ""
    assert transcript([{"role": "user", "content": "the cat"}, assistant]) == (
        "user: the cat\nassistant: ab"
    )
    assert transcript([user]) == "Look: nice"
    tool = {"role": "tool", "content": None}
    assert transcript([user, tool]) == "user: Look: nice\ntool: "
    assert transcript([user, tool], text_with_placeholders) == (
        "user: Look: [image_url]nice\ntool: "
    )
    assert transcript([QUESTION, calling(call())]) == (
        'user: Weather?\nassistant: weather({"city": "Paris"})'
    )


def test_null_fields_are_absent_and_null_content_is_empty() -> None:
    message = calling(content=None) | {"refusal": None, "audio": None, "name": None}
    assert normalize([message]) == [{"role": "assistant", "content": ""}]
    tool = {"role": "tool", "content": [{"type": "text", "text": "21"}], "tool_call_id": "1"}
    assert normalize([tool]) == [{"role": "tool", "content": "21", "tool_call_id": "1"}]


def test_a_refusal_is_the_content_of_a_message_without_one() -> None:
    refused = {"role": "assistant", "content": None, "refusal": "I cannot."}
    assert normalize([refused]) == [{"role": "assistant", "content": "I cannot."}]


def test_the_transcript_of_audio_is_the_content_of_a_message_without_one() -> None:
    said = {"role": "assistant", "content": None, "audio": {"data": "AA", "transcript": "Late."}}
    assert normalize([said]) == [{"role": "assistant", "content": "Late."}]
    assert normalize([{**said, "content": "read"}]) == [{"role": "assistant", "content": "read"}]
    answer = Candidate(0, {"message": said})
    assert turns([QUESTION], answer)[-1] == {"role": "assistant", "content": "Late."}


@pytest.mark.parametrize(
    ("arguments", "parsed"),
    [
        ('{"city": "Paris"}', {"city": "Paris"}),
        ({"city": "Paris"}, {"city": "Paris"}),
        ("", {}),
        (None, {}),
        ("{broken", {}),
        ("[1]", {}),
        ("3", {}),
    ],
)
def test_the_arguments_of_a_call_are_an_object(arguments: object, parsed: dict) -> None:
    [turn] = normalize([calling(call(arguments=arguments, index=None))])
    function = {"name": "weather", "arguments": parsed}
    assert turn["content"] == ""
    assert turn["tool_calls"] == [{"id": "1", "type": "function", "function": function}]


def test_the_older_form_of_calls_becomes_the_newer_one() -> None:
    older = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "f", "arguments": "{}"},
    }
    turns = normalize([older, {"role": "function", "name": "f", "content": "21"}])
    assert turns[0]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {}}}
    ]
    assert "function_call" not in turns[0]
    assert turns[1] == {"role": "tool", "name": "f", "content": "21"}


def test_the_call_of_a_custom_tool_becomes_the_call_of_a_function() -> None:
    [turn] = normalize([{"role": "assistant", "content": None, **calling(custom("select 1"))}])
    function = {"name": "sql", "arguments": {"input": "select 1"}}
    assert turn["tool_calls"] == [{"id": "2", "type": "function", "function": function}]


def test_system_turns_that_follow_each_other_are_one() -> None:
    system = {"role": "system", "content": "Be brief."}
    developer = {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]}
    merged = {"role": "system", "content": "Be brief.\n\nBe kind."}
    assert normalize([system, developer, QUESTION]) == [merged, QUESTION]
    assert normalize([system, QUESTION, system]) == [system, QUESTION, system]
    plain = {"role": "developer", "content": "Be kind."}
    assert normalize([system, developer], developer=True) == [system, plain]


def test_parts_that_are_not_text_stay_for_templates_that_read_them() -> None:
    thinking = {"type": "thinking", "thinking": "hm"}
    [turn] = normalize([{"role": "user", "content": [thinking, *PARTS]}])
    assert turn["content"] == PARTS


def test_normalizing_leaves_the_messages_unchanged() -> None:
    messages = [calling(call()), {"role": "user", "content": PARTS, "name": None}]
    before = json.dumps(messages)
    normalize(messages)
    assert json.dumps(messages) == before


class Strict:
    """A template that knows the given roles, and may demand that they alternate."""

    def __init__(self, *roles: str, alternate: bool = False) -> None:
        self.roles = roles
        self.alternate = alternate

    def __call__(self, conversation: list[dict]) -> str:
        roles = [turn["role"] for turn in conversation]
        for role in roles:
            if role not in self.roles:
                raise ValueError(f"no role {role}")
        if self.alternate and any(a == b for a, b in pairwise(roles)):
            raise ValueError("roles must alternate")
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in conversation)


SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "Sun."}


@pytest.mark.parametrize(
    ("template", "messages", "text"),
    [
        (Strict("system", "user"), [SYSTEM, QUESTION], "<system>Be brief.<user>Weather?"),
        (Strict("user"), [SYSTEM, QUESTION], "<user>Be brief.\n\nWeather?"),
        (Strict("user"), [SYSTEM], "<user>Be brief."),
        (
            Strict("user", "assistant"),
            [SYSTEM, ANSWER, QUESTION],
            "<assistant>Sun.<user>Be brief.\n\nWeather?",
        ),
        (
            Strict("user", "assistant"),
            [QUESTION, ANSWER, SYSTEM, QUESTION],
            "<user>Weather?<assistant>Sun.<user>Be brief.\n\nWeather?",
        ),
        (
            Strict("user", "assistant", alternate=True),
            [QUESTION, QUESTION, ANSWER, ANSWER],
            "<user>Weather?\n\nWeather?<assistant>Sun.\n\nSun.",
        ),
        (
            Strict("user", "assistant"),
            [QUESTION, calling(call()), {"role": "tool", "content": "21"}],
            "<user>Weather?<assistant><tool_call>\n"
            '{"name": "weather", "arguments": {"city": "Paris"}}'
            "\n</tool_call><user><tool_response>\n21\n</tool_response>",
        ),
    ],
)
def test_a_template_gets_a_form_that_it_knows(template: Strict, messages: list, text: str) -> None:
    assert render(template, normalize(messages)) == text


def test_the_first_refusal_is_the_reason() -> None:
    with pytest.raises(ValueError, match="no role system"):
        render(Strict("assistant"), normalize([SYSTEM, QUESTION]))


def test_images_stay_beside_the_system_turn_that_joins_them() -> None:
    user = {"role": "user", "content": [IMAGE]}
    parts = [{"type": "text", "text": "Be brief."}, IMAGE]
    assert render(Strict("user"), normalize([SYSTEM, user])) == f"<user>{parts}"


def test_calls_become_text_and_their_results_turns_of_the_user() -> None:
    turns = normalize(
        [
            QUESTION,
            calling(call("add", '{"a": 1}'), call("other", {"a": True})),
            {"role": "tool", "content": "2"},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "Five.", "tool_calls": []},
            {"role": "tool", "content": None},
        ]
    )
    result = calls_as_text(turns)
    assert [turn["role"] for turn in result] == ["user", "assistant", "user", "assistant", "user"]
    assert result[1]["content"] == (
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "other", "arguments": {"a": true}}\n</tool_call>'
    )
    assert result[2]["content"] == (
        "<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>"
    )
    assert not any("tool_calls" in turn for turn in result)
    assert calls_as_text(turns[:1]) == turns[:1], "a plain conversation stays the same"
