"""Every object in a response fits OpenAI's own description of the API."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

USER: Any = [{"role": "user", "content": "hello there"}]
OPENAI = json.loads((Path(__file__).parents[1] / "data" / "openai_responses.json").read_text())
REGISTRY: Any = Registry().with_resource(
    "openai", Resource.from_contents(OPENAI, default_specification=DRAFT202012)
)

ALIGNS: Any = [
    {},
    {"align": {"best_of_n": {"n": 5}}},
    {"n": 2, "align": {"best_of_n": {"n": 5}, "details": "candidates"}},
    {"n": 3},
    {"align": {"rewards": {"number": 0, "silent": 0}}},
    {"max_tokens": 1},
]


def conforms(value: object, name: str) -> None:
    schema = {"$ref": f"openai#/components/schemas/{name}"}
    jsonschema.Draft202012Validator(schema, registry=REGISTRY).validate(value)


def events(text: str) -> list[Any]:
    lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("fields", ALIGNS)
def test_chat_response(numbers: Any, fields: Any) -> None:
    answer = numbers.chat(**fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    conforms(answer.json(), "CreateChatCompletionResponse")


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("fields", ALIGNS)
def test_chat_stream(numbers: Any, fields: Any, usage: bool) -> None:
    answer = numbers.chat(stream=True, stream_options={"include_usage": usage}, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = events(answer.text)
    for chunk in chunks:
        conforms(chunk, "CreateChatCompletionStreamResponse")
    complete = numbers.chat(**fields).json()
    streamed = dict.fromkeys((c["index"] for chunk in chunks for c in chunk["choices"]), "")
    for chunk in chunks:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert list(streamed.values()) == [
        choice["message"]["content"] for choice in complete["choices"]
    ]
    if usage:
        assert chunks[-1]["usage"] == complete["usage"]


@pytest.mark.parametrize("fields", ALIGNS)
def test_completion_response_and_stream(numbers: Any, fields: Any) -> None:
    body = {"model": "fake", "prompt": "once upon", "max_tokens": 16, **fields}
    answer = numbers.post(body, "/v1/completions")
    assert answer.status_code == 200, answer.text
    conforms(answer.json(), "CreateCompletionResponse")
    streamed = numbers.post({**body, "stream": True}, "/v1/completions")
    for chunk in events(streamed.text):
        if all(choice["finish_reason"] is not None for choice in chunk["choices"]):
            conforms(
                chunk, "CreateCompletionResponse"
            )  # its schema, unlike real answers, knows no unfinished chunk
        assert chunk["object"] == "text_completion"


def test_models(numbers: Any) -> None:
    listed = numbers.get("/v1/models").json()
    conforms(listed, "ListModelsResponse")
    for model in listed["data"]:
        conforms(numbers.get(f"/v1/models/{model['id']}").json(), "Model")


def test_models_were_created_when_the_server_started(numbers: Any) -> None:
    listed = numbers.get("/v1/models").json()["data"]
    listed.append(numbers.get(f"/v1/models/{listed[0]['id']}").json())
    (created,) = {model["created"] for model in listed}
    assert 0 < created == numbers.service.start_time
    assert numbers.get("/v1/models").json()["data"][0]["created"] == created


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"{}", 400),
        (
            "POST",
            "/v1/chat/completions",
            b'{"model": "nope", "messages": [{"role": "user", "content": "x"}]}',
            404,
        ),
        ("POST", "/v1/nowhere", b"{}", 404),
        ("GET", "/nowhere", b"", 404),
        ("GET", "/v1/chat/completions", b"", 405),
        ("DELETE", "/v1/models", b"", 405),
        ("POST", "/v1/align/score", b"{}", 400),
        ("POST", "/v1/align/judge", b"{}", 400),
        ("GET", "/v1/models/nope", b"", 404),
    ],
)
def test_errors(numbers: Any, method: str, path: str, body: bytes, status: int) -> None:
    with numbers.http() as http:
        answer = http.request(method, path, content=body)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    conforms(answer.json(), "ErrorResponse")
    if status == 405:
        assert set(answer.headers["allow"].split(", ")) in ({"POST"}, {"GET", "HEAD"})


def test_every_answer_has_a_request_id(numbers: Any) -> None:
    assert (
        numbers.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"]
        == "mine-1"
    )
    bad = numbers.get("/health", headers={"x-request-id": "no spaces"}).headers["x-request-id"]
    assert bad != "no spaces"
    assert len(bad) == 32


def test_request_ids_differ_after_a_seed(numbers: Any) -> None:
    # A model or a reward may seed the generator that all of a process shares.
    ids = set()
    for _ in range(3):
        random.seed(1)
        ids.add(numbers.get("/health").headers["x-request-id"])
    assert len(ids) == 3
