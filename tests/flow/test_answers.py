"""The answer that rewards read: with its beginning, without the text that the client wrote."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from infer_align.flow.answers import in_play, whole_answer, without_echo
from infer_align.flow.request import Request
from infer_align.types import Candidate, Kind
from tests.flow.builders import plan

TURN = {"role": "assistant", "content": "The owl"}
QUESTION = {"role": "user", "content": "Which?"}


def read(body: dict[str, Any], kind: Kind, messages: Any, choice: Any, begun: str = "") -> Any:
    made = plan(begun_answer=begun, request=Request(body, kind=kind))
    return whole_answer(replace(made, messages=messages), Candidate(0, choice))


@pytest.mark.parametrize("prompt", ["The owl", [3, 4]])
def test_an_echoed_prompt_is_no_part_of_the_answer(prompt: Any) -> None:
    messages = [{"role": "user", "content": "The owl"}]
    choice = {"text": "The owl eats. The owl", "finish_reason": "stop"}
    answer = read({"prompt": prompt, "echo": True}, "completion", messages, choice)
    assert answer.text == " eats. The owl"
    assert answer.finish_reason == "stop"
    assert read({"prompt": prompt}, "completion", messages, choice).text == choice["text"]


@pytest.mark.parametrize(
    ("fields", "messages", "text"),
    [
        ({"echo": True}, [QUESTION, TURN], " eats"),
        ({"echo": True}, [QUESTION], "The owl eats"),
        ({"echo": False}, [QUESTION, TURN], "The owl eats"),
        ({"echo": True, "add_generation_prompt": False}, [{**TURN, "role": "user"}], " eats"),
    ],
)
def test_a_chat_that_echoes_its_last_message(
    fields: dict[str, Any], messages: Any, text: str
) -> None:
    body = {"messages": messages, **fields}
    choice = {"message": {"role": "assistant", "content": "The owl eats"}}
    assert read(body, "chat", messages, choice).text == text


def test_an_echoed_beginning_counts_once() -> None:
    body = {"messages": [QUESTION, TURN], "continue_final_message": True}
    plain = {"message": {"role": "assistant", "content": " eats"}}
    echoed = {"message": {"role": "assistant", "content": "The owl eats"}}
    for choice, fields in ((plain, {}), (echoed, {"echo": True})):
        answer = read({**body, **fields}, "chat", [QUESTION], choice, "The owl")
        assert answer.text == "The owl eats"
    made = plan(begun_answer="The owl", request=Request({**body, "echo": True}))
    made = replace(made, messages=[QUESTION])
    assert without_echo(made, Candidate(0, echoed)).text == " eats"


def said(index: int, text: str, **fields: Any) -> Candidate:
    return Candidate(index, {"message": {"role": "assistant", "content": text}}, **fields)


def test_a_candidate_that_was_cut_before_its_first_word_is_not_compared() -> None:
    candidates = [
        said(0, "", interrupted=True),
        said(1, " \n", completion_tokens=2, interrupted=True),
        said(2, "The", completion_tokens=1, interrupted=True),
        said(3, "", completion_tokens=1),
        said(4, "The owl", error="broken"),
    ]
    assert [each.index for each in in_play(plan(), candidates)] == [2, 3]
    assert [each.index for each in in_play(plan(), candidates[:2])] == [0, 1]


def test_a_filtered_candidate_is_not_compared_with_one_that_speaks() -> None:
    filtered = Candidate(0, {"message": {"content": None}, "finish_reason": "content_filter"})
    partly = Candidate(1, {"message": {"content": "The"}, "finish_reason": "content_filter"})
    assert in_play(plan(), [filtered, partly]) == [partly]
    assert in_play(plan(), [filtered]) == [filtered]


def test_an_echo_alone_is_no_answer() -> None:
    made = plan(request=Request({"prompt": "The owl", "echo": True}, kind="completion"))
    made = replace(made, messages=[{"role": "user", "content": "The owl"}])
    cut = Candidate(0, {"text": "The owl"}, interrupted=True)
    begun = Candidate(1, {"text": "The owl eats"}, interrupted=True)
    assert in_play(made, [cut, begun]) == [begun]
