"""From an OpenAI body to a Request: the part for the engine, and the parsed `align`."""

from __future__ import annotations

from typing import Any

import pytest

from infer_align.errors import InvalidRequest
from infer_align.flow.request import check_prompt, parse_request
from tests.flow.builders import REQUEST_BODY


def test_align_given_empty_is_still_aligned() -> None:
    assert parse_request({**REQUEST_BODY, "align": {}}, "chat", {}).aligned
    assert not parse_request({**REQUEST_BODY, "align": None}, "chat", {}).aligned
    assert parse_request(REQUEST_BODY, "chat", {"p": {}}, "p").aligned


def test_align_and_nulls_are_not_forwarded() -> None:
    body = {**REQUEST_BODY, "user": None, "align": {"details": "none"}}
    request = parse_request(body, "chat", {})
    assert request.body == REQUEST_BODY
    assert request.align.details == "none"


def test_whole_numbers_may_have_a_decimal_point() -> None:
    body = {"prompt": "x", "logprobs": 1.0, "max_tokens": 4.0, "temperature": 1.0}
    request = parse_request(body, "completion", {})
    assert repr(request.body) == repr({**body, "logprobs": 1, "max_tokens": 4})
    chat = parse_request({**REQUEST_BODY, "logprobs": True}, "chat", {})
    assert chat.body["logprobs"] is True


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hello", "messages"),
        (["hello"], "messages[0]"),
        ([{"content": "hello"}], "messages[0]"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 1}], "messages[0].content"),
        ([{"role": "user", "content": [{}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ],
)
def test_a_message_of_the_wrong_shape_is_named(messages: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_prompt({"messages": messages}, "chat")
    assert caught.value.param == param


def test_an_assistants_message_may_lack_content() -> None:
    check_prompt({"messages": [{"role": "assistant", "tool_calls": []}]}, "chat")


@pytest.mark.parametrize("prompt", [None, 1, ["a"], [], [-1], [True], [1.0], [[1]]])
def test_a_completion_prompt_is_a_string_or_token_ids(prompt: Any) -> None:
    check_prompt({"prompt": "a"}, "completion")
    check_prompt({"prompt": [0, 5]}, "completion")
    with pytest.raises(InvalidRequest) as caught:
        check_prompt({"prompt": prompt}, "completion")
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("name", ["best_of_n", "vas", "dpa", "rps", "early_stop", "trust_judge"])
def test_a_method_beside_align_is_sent_inside(name: str) -> None:
    with pytest.raises(InvalidRequest, match="write it inside align") as caught:
        parse_request({**REQUEST_BODY, name: {"n": 2}}, "chat", {})
    assert caught.value.param == name
    parse_request({**REQUEST_BODY, name: None}, "chat", {})
