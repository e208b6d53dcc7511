"""The requests that Open WebUI sends to an OpenAI-compatible server, in their shapes."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.slow

MODELS = {"numbers": "fake", "upstream_numbers": "fake", "embedded": "demo"}
SERVERS = pytest.mark.parametrize("name", MODELS)
CHAT = "/v1/chat/completions"
TURNS = [
    {"role": "user", "content": "What do owls eat?"},
    {"role": "assistant", "content": "Mice."},
    {"role": "user", "content": [{"type": "text", "text": "And crows?"}]},
]
TASK = (
    "### Task:\nGenerate a concise title with an emoji.\n### Chat History:\nUSER: What do owls eat?"
)
BODIES: dict[str, dict[str, Any]] = {
    "chat": {
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": "Be brief."}, *TURNS],
    },
    "sampling": {
        "stream": True,
        "messages": TURNS,
        "temperature": 0.8,
        "top_p": 0.9,
        "max_tokens": 12,
        "frequency_penalty": 0.1,
        "presence_penalty": 0,
        "seed": 0,
        "stop": ["###"],
        "logit_bias": {},
    },
    "title": {
        "stream": False,
        "max_completion_tokens": 20,
        "messages": [{"role": "user", "content": TASK}],
    },
    "tags": {
        "stream": False,
        "max_tokens": 20,
        "messages": [{"role": "user", "content": TASK.replace("title", "list of tags")}],
    },
    "follow_ups": {
        "stream": False,
        "messages": [{"role": "user", "content": TASK.replace("title", "list of follow-ups")}],
        "metadata": {
            "task": "follow_up_generation",
            "task_body": {"model": "m", "messages": TURNS, "chat_id": "c1", "message_id": "m1"},
            "chat_id": "c1",
            "files": None,
        },
    },
    "emoji": {
        "stream": False,
        "max_tokens": 4,
        "messages": [{"role": "user", "content": TASK.replace("title", "single emoji")}],
        "chat_template_kwargs": {},
        "metadata": {"task": "emoji_generation", "features": {"web_search": False}},
    },
    "query": {
        "stream": False,
        "messages": [{"role": "user", "content": TASK.replace("title", "search query")}],
        "metadata": {"task": "query_generation", "type": "web_search"},
        "response_format": None,
        "tools": None,
    },
    "user": {"stream": False, "user": "5b1f", "metadata": {"chat_id": "c1"}, "messages": TURNS},
}


@SERVERS
@pytest.mark.parametrize("shape", BODIES)
def test_a_request_is_answered(servers: dict[str, Any], name: str, shape: str) -> None:
    live = servers[name]
    body = {"max_tokens": 16, **BODIES[shape]}
    if "max_completion_tokens" in body:
        body.pop("max_tokens")
    answer = live.post({"model": MODELS[name], **body}, CHAT)
    assert answer.status_code == 200, answer.text
    if body["stream"]:
        assert answer.text.rstrip().endswith("data: [DONE]")
        assert '"finish_reason"' in answer.text
        wants_usage = "stream_options" in body
        assert ('"completion_tokens"' in answer.text) is wants_usage
    else:
        assert answer.json()["choices"][0]["message"]["role"] == "assistant"


@SERVERS
def test_models_are_listed(servers: dict[str, Any], name: str) -> None:
    answer = servers[name].get("/v1/models").json()
    assert MODELS[name] in [entry["id"] for entry in answer["data"]]


@SERVERS
@pytest.mark.parametrize("path", ["/api/tags", "/api/version", "/v1/api/tags"])
def test_probes_for_another_api_are_a_clear_404(
    servers: dict[str, Any], name: str, path: str
) -> None:
    answer = servers[name].get(path)
    assert answer.status_code == 404
    assert path in answer.json()["error"]["message"]


def test_fields_that_no_engine_knows_are_refused_by_name(servers: dict[str, Any]) -> None:
    body = {"model": "demo", "messages": TURNS, "max_tokens": 4, "tool_ids": ["t1"]}
    answer = servers["embedded"].post(body, CHAT)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tool_ids"
