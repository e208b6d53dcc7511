"""Calls for one token continue a prefix exactly, and their tokens are recognized."""

from __future__ import annotations

from typing import Any

import pytest

from infer_align.engines.openai.continuation import Continuation, ContinuationPrompt, Way
from infer_align.upstream import UpstreamFailed

VOCABULARY = {b"a": 1, b"\xe2\x82": 2, b" b": 3}
QUESTION = [{"role": "user", "content": "q"}]
PROMPT = ContinuationPrompt("<u>q", (4,), {"messages": QUESTION, "chat_template_kwargs": {"x": 1}})


def continuation(way: Way) -> Continuation:
    return Continuation(way, VOCABULARY, "m")


def top_logprobs(way: Way, logprobs: Any) -> dict[int, float]:
    return continuation(way).top_logprobs({"choices": [{"logprobs": logprobs}]})


def test_token_ids_are_continued_by_token_ids() -> None:
    assert continuation("ids").body(PROMPT, [5], "so")["prompt"] == [4, 5]


def test_a_text_is_continued_by_its_text() -> None:
    assert continuation("text").body(PROMPT, [5], "so")["prompt"] == "<u>qso"


def test_a_chat_is_continued_by_an_unfinished_turn() -> None:
    body = continuation("chat").body(PROMPT, [5], "so")
    assert body["messages"] == [*QUESTION, {"role": "assistant", "content": "so"}]
    assert body["continue_final_message"] is True
    assert body["chat_template_kwargs"] == {"x": 1}


def test_the_first_token_of_a_chat_starts_a_new_turn() -> None:
    body = continuation("chat").body(PROMPT, [], "")
    assert body["messages"] == QUESTION
    assert "continue_final_message" not in body


def test_tokens_are_recognized_by_their_ids() -> None:
    logprobs = {"top_logprobs": [{"token_id:7": -1.0, "token_id:1": -2.0}]}
    assert top_logprobs("ids", logprobs) == {7: -1.0, 1: -2.0}


def test_tokens_are_recognized_by_their_texts_and_unknown_ones_are_skipped() -> None:
    names = {"a": -1.0, "bytes:\\xe2\\x82": -2.0, " b": -3.0, "?": -4.0}
    assert top_logprobs("text", {"top_logprobs": [names]}) == {1: -1.0, 2: -2.0, 3: -3.0}


def test_tokens_of_a_chat_are_recognized_by_their_bytes_or_texts() -> None:
    entries = [
        {"token": "\ufffd", "bytes": [0xE2, 0x82], "logprob": -1.0},
        {"token": "a", "bytes": None, "logprob": -2.0},
    ]
    logprobs = {"content": [{"token": "a", "top_logprobs": entries}]}
    assert top_logprobs("chat", logprobs) == {2: -1.0, 1: -2.0}


@pytest.mark.parametrize(
    "logprobs", [None, {}, {"top_logprobs": []}, {"top_logprobs": [{"?": -1.0}]}]
)
def test_an_answer_without_known_tokens_fails(logprobs: Any) -> None:
    with pytest.raises(UpstreamFailed):
        top_logprobs("text", logprobs)


def test_the_sampled_token_is_recognized() -> None:
    text = {"choices": [{"logprobs": {"tokens": ["a"]}}]}
    chat = {"choices": [{"logprobs": {"content": [{"token": " b"}]}}]}
    assert continuation("text").sampled_token(text) == 1
    assert continuation("chat").sampled_token(chat) == 3


def test_an_answer_that_stops_without_a_token_is_the_end() -> None:
    answer = {"choices": [{"logprobs": {"tokens": []}, "finish_reason": "stop"}]}
    assert continuation("text").sampled_token(answer) is None


@pytest.mark.parametrize(
    "choice",
    [
        {"logprobs": {"tokens": []}, "finish_reason": "length"},
        {"logprobs": {"tokens": ["?"]}, "finish_reason": "length"},
    ],
)
def test_a_sampled_token_that_is_missing_or_unknown_fails(choice: dict[str, Any]) -> None:
    with pytest.raises(UpstreamFailed):
        continuation("text").sampled_token({"choices": [choice]})
