"""Conversations in every form that clients send them are read by engine, rewards and judge alike.

What a reward cannot read is refused before anything is drawn.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.server.conftest import USER, Live

pytest.importorskip("torch")

CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"c": 1}'}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None}
RESULT = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "21"}]}
HISTORIES: dict[str, list[dict[str, Any]]] = {
    "a call and its result": [*USER, CALLED, RESULT],
    "a call with text": [*USER, {**CALLED, "content": "Let me see."}, RESULT],
    "no calls": [*USER, {"role": "assistant", "content": "yes", "tool_calls": []}, *USER],
    "the older form": [
        *USER,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}},
        {"role": "function", "name": "f", "content": "21"},
    ],
    "a custom tool": [
        *USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "custom", "custom": {"name": "sql", "input": "select 1"}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "1"},
    ],
    "a tool without a result": [*USER, CALLED, {**RESULT, "content": None}],
    "a function without a result": [
        *USER,
        {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": None},
    ],
    "two system turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind."},
        *USER,
    ],
    "a refusal": [*USER, {"role": "assistant", "refusal": "no"}, *USER],
    "thinking": [
        *USER,
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "yes"}],
        },
        *USER,
    ],
}


def configuration(reward: str, replies: list[dict[str, Any]]) -> str:
    lines = ", ".join(
        "{" + ", ".join(f"{key} = {toml(value)}" for key, value in reply.items()) + "}"
        for reply in replies
    )
    return f"""
[engine]
kind = "fake"
replies = [{lines}]
{rewards(reward)}"""


def rewards(reward: str) -> str:
    return f"""
[rewards.model]
kind = "classifier"
model = {json.dumps(reward)}
[rewards.short]
kind = "rules"
words_weight = -1.0
require = ["Paris"]
[server]
default_rewards = {{model = 1.0}}
"""


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml(each) for each in value) + "]"
    return json.dumps(value)


def calls(city: str) -> dict[str, Any]:
    function = {"name": "weather", "arguments": json.dumps({"city": city})}
    return {"text": "", "tool_calls": [{"id": city, "type": "function", "function": function}]}


@pytest.fixture
def live(serve: Callable[[str], Live], reward_model: Callable[..., str]) -> Live:
    replies = [calls("Rome"), calls("Paris"), calls("Oslo")]
    return serve(configuration(reward_model(), replies))


@pytest.fixture
def engines(
    live: Live,
    serve: Callable[[str], Live],
    reward_model: Callable[..., str],
    language_model: Callable[..., str],
) -> list[Live]:
    """The scripted engine, a server before it, and a tiny model in the embedded engine."""
    scored = rewards(reward_model())
    upstream = f'[engine]\nkind = "openai"\nurls = ["{live.base_url}"]\n{scored}'
    model = language_model(max_position_embeddings=1024)
    embedded = f'[engine]\nkind = "transformers"\nmodel = {json.dumps(model)}\n{scored}'
    return [live, serve(upstream), serve(embedded)]


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_every_form_of_a_history_is_scored_on_every_engine(
    engines: list[Live], history: list[dict[str, Any]]
) -> None:
    for live in engines:
        check_scored(live, history)


def check_scored(live: Live, history: list[dict[str, Any]]) -> None:
    body = {"messages": history, "candidates": ["yes", "no"]}
    answer = live.post(body, "/v1/align/score")
    assert answer.status_code == 200, answer.text
    assert [each["error"] for each in answer.json()["candidates"]] == [None, None]
    align = {"best_of_n": {"n": 2}, "rewards": {"model": 1.0}}
    drawn = live.chat(align, messages=history, max_tokens=4)
    assert drawn.status_code == 200, drawn.text


def test_rewards_see_the_calls_of_candidates(live: Live) -> None:
    align = {"best_of_n": {"n": 3}, "rewards": {"short": 1.0, "model": 0.0}, "ensemble": {}}
    answer = live.chat(align).json()
    assert answer["align"]["selected"] == 1
    [choice] = answer["choices"]
    assert choice["message"]["tool_calls"][0]["id"] == "Paris"
    scores = [c["scores"]["model"]["value"] for c in answer["align"]["candidates"]]
    assert len(set(scores)) == 3, "a reward model sees the calls too"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "wizard", "content": "abracadabra"}], "roles are system"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "image_url",
        ),
    ],
)
def test_what_a_reward_cannot_read_is_refused_before_anything_is_drawn(
    live: Live, messages: list[dict[str, Any]], words: str
) -> None:
    drawn = live.metric("infer_align_tokens_total", kind="returned")
    answer = live.chat({"best_of_n": {"n": 2}}, messages=messages)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == "align.rewards.model"
    assert words in error["message"]
    assert live.metric("infer_align_tokens_total", kind="returned") == drawn
    scored = live.post({"messages": messages, "candidates": ["a"]}, "/v1/align/score")
    assert scored.status_code == 400
    assert scored.json()["error"]["param"] == "rewards.model"


def test_a_candidate_continues_the_turn_that_the_client_began(live: Live) -> None:
    begun = [*USER, {"role": "assistant", "content": "In Paris it is"}]
    align = {"best_of_n": {"n": 2}, "rewards": {"short": 1.0}, "details": "scores"}
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    joined = live.chat(align, messages=begun, **fields).json()["align"]["candidates"]
    apart = live.chat(align, messages=begun).json()["align"]["candidates"]
    for with_beginning, alone in zip(joined, apart, strict=True):
        words = len(begun[1]["content"].split())
        mentions = 0 if with_beginning["index"] == 1 else 1
        gained = with_beginning["objective"] - alone["objective"]
        assert gained == pytest.approx(mentions - words)


@pytest.mark.parametrize(
    "calls", ["none", [1], [{"type": "function"}], [{"function": {"arguments": "{}"}}]]
)
def test_calls_of_another_shape_are_refused_by_name(live: Live, calls: object) -> None:
    history = [*USER, {"role": "assistant", "content": None, "tool_calls": calls}]
    answer = live.chat({"best_of_n": {"n": 2}}, messages=history)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[1].tool_calls"
