"""Conversations in every form are read by vLLM, by rewards and by the judge alike."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines.vllm.conftest import LIMIT_SECONDS
from tests.engines.vllm.stepping import WARNINGS
from tests.server.conftest import Live
from tests.server.test_conversations import HISTORIES

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300), *WARNINGS]

KEY = {"Authorization": "Bearer sesame"}
BEST = {"best_of_n": {"n": 2}, "rewards": {"quality": 1.0}}
JUDGED = {"best_of_n": {"n": 2}, "trust_judge": {"scale": 5}}


def post(live: Live, path: str, body: dict[str, Any]) -> Any:
    with live.http(headers=KEY) as client:
        return client.post(path, json={"model": "owl", **body}, timeout=LIMIT_SECONDS)


# What vLLM's own server refuses: the role "function", calls of custom tools, and null results.
REFUSED = {
    "the older form": "unknown role: function",
    "a function without a result": "unknown role: function",
    "a custom tool": "type 'function'",
    "a tool without a result": "should be a valid string",
}
READ = {name: history for name, history in HISTORIES.items() if name not in REFUSED}


@pytest.mark.parametrize("history", READ.values(), ids=READ)
def test_every_form_of_a_history_is_answered_and_scored(
    live: Live, history: list[dict[str, Any]]
) -> None:
    for align in (BEST, JUDGED):
        body = {"messages": history, "max_tokens": 6, "align": align}
        answer = post(live, "/v1/chat/completions", body)
        assert answer.status_code == 200, answer.text
        for candidate in answer.json()["align"]["candidates"]:
            assert candidate["scores"]
            assert None not in [score["value"] for score in candidate["scores"].values()]
    scored = post(
        live,
        "/v1/align/score",
        {"messages": history, "candidates": ["a", "b"], "rewards": {"quality": 1}},
    )
    assert scored.status_code == 200, scored.text
    assert [each["error"] for each in scored.json()["candidates"]] == [None, None]


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]


@pytest.mark.parametrize(
    ("messages", "words"),
    [(IMAGE, "image"), *((HISTORIES[name], words) for name, words in REFUSED.items())],
)
def test_what_cannot_be_read_is_refused_before_anything_is_drawn(
    live: Live, messages: list[dict[str, Any]], words: str
) -> None:
    generated = live.metric("vllm:generation_tokens_total")
    answer = post(live, "/v1/chat/completions", {"messages": messages, "align": BEST})
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]
    assert live.metric("vllm:generation_tokens_total") == generated


def test_an_echoed_beginning_is_scored_once(live: Live) -> None:
    begun = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "The owl"}]
    fields = {"continue_final_message": True, "add_generation_prompt": False, "temperature": 0}
    body = {"messages": begun, "max_tokens": 6, "align": BEST, **fields}
    plain = post(live, "/v1/chat/completions", body).json()
    echoed = post(live, "/v1/chat/completions", {**body, "echo": True}).json()
    text = plain["choices"][0]["message"]["content"]
    assert echoed["choices"][0]["message"]["content"] == "The owl" + text
    assert echoed["align"]["candidates"][0]["scores"] == plain["align"]["candidates"][0]["scores"]
