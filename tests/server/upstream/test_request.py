"""A client's request reaches the upstream as it was written."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines.openai.upstream import FakeUpstream
from tests.server.upstream.conftest import BEST_OF_4, Serve, align_of

FIELDS = {
    "temperature": 0.3,
    "top_p": 0.9,
    "presence_penalty": 0.1,
    "frequency_penalty": -0.2,
    "max_completion_tokens": 17,
    "stop": ["END", "\n\n"],
    "logit_bias": {"42": -5},
    "logprobs": True,
    "top_logprobs": 3,
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "object"}},
    },
    "tools": [
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
        }
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning_effort": "low",
    "user": "someone",
    "metadata": {"a": "b"},
    "service_tier": "default",
    "min_p": 0.05,
    "chat_template_kwargs": {"enable_thinking": False},
    "custom_field": {"nested": [1, "ü", None]},
}
TURNS = [
    {"role": "developer", "content": "be brief", "name": "d"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "look"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,x"}},
        ],
    },
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "c", "content": "4"},
]


@pytest.mark.parametrize(("align", "n"), [(None, None), (BEST_OF_4, 4)])
@pytest.mark.parametrize("stream", [False, True])
def test_every_field_arrives_unchanged_and_in_order(
    up: FakeUpstream, serve_upstream: Serve, align: Any, n: int | None, stream: bool
) -> None:
    server = serve_upstream()
    answer = server.chat(align, **{**FIELDS, "messages": TURNS, "stream": stream, "seed": 12})
    assert answer.status_code == 200, answer.text
    (body,) = up.bodies
    assert {key: body[key] for key in FIELDS} == FIELDS
    assert body["messages"] == TURNS
    assert (body["model"], body["seed"], body.get("n")) == ("up", 12, n)
    added = {"model", "messages", "seed", "n", "stream", "stream_options"}
    assert set(body) - set(FIELDS) <= added
    assert [key for key in body if key in FIELDS] == list(FIELDS)
    # The upstream streams only if the client reads the candidate as it is written.
    assert bool(body.get("stream")) == (stream and not align)


@pytest.mark.parametrize("align", [None, BEST_OF_4])
def test_a_limit_of_tokens_per_minute_does_not_turn_calls_into_streams(
    up: FakeUpstream, serve_upstream: Serve, align: Any
) -> None:
    server = serve_upstream(extra="[limits]\ncandidate_tokens_per_minute = 100000\n")
    answer = server.chat(align)
    assert "stream" not in up.bodies[0]
    spent = 100_000 - server.service.tokens.available("127.0.0.1")
    assert spent <= answer.json()["usage"]["completion_tokens"]


def test_without_a_seed_none_is_sent(up: FakeUpstream, serve_upstream: Serve) -> None:
    align_of(serve_upstream().chat({"best_of_n": {"n": 3}}))
    assert "seed" not in up.bodies[0]


def test_single_calls_have_their_own_seeds(up: FakeUpstream, serve_upstream: Serve) -> None:
    server = serve_upstream('n = "single"')
    for _ in range(2):
        server.chat(BEST_OF_4, seed=5)
    seeds = [body["seed"] for body in up.bodies]
    assert 5 in seeds[:4]
    assert len(set(seeds[:4])) == 4
    assert sorted(seeds[:4]) == sorted(seeds[4:]), "equal requests have equal seeds"


def test_the_key_is_sent_to_the_upstream_only(
    up: FakeUpstream, serve_upstream: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPSTREAM_KEY", "sk-upstream-secret")
    server = serve_upstream('api_key_env = "UPSTREAM_KEY"')
    up.behave = lambda _, __: "error_401"
    answer = server.post(
        {"model": "up", "messages": TURNS[:1]},
        headers={"authorization": "Bearer client", "x-its-endpoint": "http://evil"},
    )
    assert up.headers[0]["authorization"] == "Bearer sk-upstream-secret"
    assert "x-its-endpoint" not in up.headers[0]
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "engine_failed"
    assert "secret" not in answer.text
    up.behave = lambda _, __: "redirect"
    assert server.chat().status_code == 502


def test_a_number_that_is_too_large_is_refused_by_name(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    server = serve_upstream()
    answer = server.post(
        b'{"model": "up", "messages": [{"role": "user", "content": "x"}], '
        b'"logit_bias": {"5": 1e400}}'
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logit_bias.5")
    deep = b'{"messages": ' + b"[" * 900 + b"1e400" + b"]" * 900 + b"}"
    assert server.post(deep).status_code == 400
    assert up.calls == 0


def test_a_field_whose_cost_cannot_be_counted_is_refused(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    body = {"model": "up", "prompt": "x", "best_of": 8, "align": {}}
    answer = serve_upstream().post(body, "/v1/completions")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "best_of")
    assert up.calls == 0
