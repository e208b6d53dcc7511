"""What vLLM says beside its choices is returned with `align`, too, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.engines.vllm.conftest import LIMIT_SECONDS
from tests.engines.vllm.stepping import WARNINGS
from tests.server.conftest import Live

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300), *WARNINGS]

# Longer than a block of the prefix cache, which has 32 tokens.
QUESTION = [{"role": "user", "content": "What is the diet of the owl? " * 6}]
FIELDS: dict[str, Any] = {"return_token_ids": True, "return_prompt_text": True}
METHODS = {
    "one draw": {"vas": {"beta": {"helpful": 1.0}}},
    "a selection": {"best_of_n": {"n": 3}},
}


def post(live: Live, route: str = "/v1/chat/completions", **fields: Any) -> Any:
    body = {"model": "owl", "temperature": 0, "max_tokens": 4, **fields}
    with live.http(headers={"Authorization": "Bearer sesame"}) as client:
        answer = client.post(route, json=body, timeout=LIMIT_SECONDS)
    assert answer.status_code == 200, answer.text
    if not fields.get("stream"):
        return answer.json()
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    joined: dict[str, Any] = {}
    for event in events:
        for key, value in json.loads(event).items():
            if value is not None:
                joined[key] = value
    return joined


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("align", METHODS.values(), ids=METHODS)
def test_fields_beside_the_choices(live: Live, align: Any, stream: bool) -> None:
    plain = post(live, messages=QUESTION, **FIELDS)
    aligned = post(live, messages=QUESTION, **FIELDS, align=align, stream=stream)
    for name in ("prompt_token_ids", "prompt_text", "system_fingerprint"):
        assert plain[name]
        assert aligned[name] == plain[name]
    assert aligned["align"]["selected"] == 0


def test_a_text_completion_has_its_fingerprint(live: Live) -> None:
    route = "/v1/completions"
    plain = post(live, route, prompt="The owl")
    aligned = post(live, route, prompt="The owl", align={"best_of_n": {"n": 2}})
    assert aligned["system_fingerprint"] == plain["system_fingerprint"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_cached_tokens_count_once_for_a_shared_prompt(live: Live, stream: bool) -> None:
    post(live, messages=QUESTION)
    plain = post(live, messages=QUESTION)["usage"]
    fields: dict[str, Any] = {"stream": stream}
    if stream:
        fields["stream_options"] = {"include_usage": True}
    best = post(live, messages=QUESTION, align={"best_of_n": {"n": 3}}, **fields)["usage"]
    assert 0 < plain["prompt_tokens_details"]["cached_tokens"] < plain["prompt_tokens"]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in (plain, best)]
    assert cached[0] == cached[1]
    assert best["prompt_tokens"] == plain["prompt_tokens"]
