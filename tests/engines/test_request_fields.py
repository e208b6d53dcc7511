"""The embedded engine honours or refuses every field of OpenAI's current requests, by name."""

from __future__ import annotations

from typing import Any, get_type_hints

import jsonschema
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from infer_align.config import Limits
from infer_align.decoding.params import SamplingParams, field_schemas
from infer_align.engines.fake import Fake
from infer_align.errors import InvalidRequest, Unsupported
from infer_align.flow.plan import make_plan
from infer_align.flow.request import parse_request
from infer_align.types import Draw
from infer_align_server.wire.stream_options import stream_options

FUNCTION = {"name": "f", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": FUNCTION}]
# For each field of the SDK's types: values that the engine accepts, and values that it refuses.
ACCEPTED: dict[str, list[Any]] = {
    "messages": [[{"role": "user", "content": "x"}]],
    "model": ["m"],
    "audio": [],
    "frequency_penalty": [0, -2, 1.5],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "logit_bias": [{}, {"5": -100}],
    "logprobs": [False, True],
    "max_completion_tokens": [1],
    "max_tokens": [1],
    "metadata": [{}, {"a": "b"}],
    "modalities": [["text"]],
    "moderation": [],
    "n": [1, 2],
    "parallel_tool_calls": [True, False],
    "prediction": [],
    "presence_penalty": [0, 2],
    "prompt_cache_key": ["k"],
    "prompt_cache_options": [{"mode": "explicit"}],
    "prompt_cache_retention": ["24h"],
    "reasoning_effort": ["none"],
    "response_format": [{"type": "text"}],
    "safety_identifier": ["s"],
    "seed": [0, -5],
    "service_tier": ["auto", "default"],
    "stop": ["x", ["x", "y"]],
    "store": [False],
    "stream": [False, True],
    "stream_options": [{"include_usage": True}, {"include_obfuscation": False}],
    "temperature": [0, 2],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "top_logprobs": [0, 20],
    "top_p": [0.1, 1],
    "user": ["u"],
    "verbosity": ["medium"],
    "web_search_options": [],
}
REFUSED: dict[str, list[Any]] = {
    "messages": [[], "x", None],
    "audio": [{"voice": "alloy", "format": "mp3"}],
    "frequency_penalty": [3],
    "function_call": [{"name": "f"}],
    "functions": [[FUNCTION]],
    "logit_bias": [{"x": 1}, {"1": 101}],
    "logprobs": [1, "yes"],
    "max_completion_tokens": [0],
    "max_tokens": [0],
    "modalities": [["text", "audio"], ["audio"]],
    "moderation": [{"model": "omni-moderation-latest"}],
    "n": [0],
    "parallel_tool_calls": ["yes", 1],
    "prediction": [{"type": "content", "content": "x"}],
    "presence_penalty": [-3],
    "reasoning_effort": ["minimal", "low", "high"],
    "response_format": [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
    ],
    "seed": ["x"],
    "service_tier": ["flex", "priority"],
    "stop": [[""]],
    "store": [True, 0],
    "stream": ["yes"],
    "stream_options": [{"include_obfuscation": True}],
    "temperature": [2.1],
    "tools": [TOOLS],
    "top_logprobs": [21],
    "top_p": [0],
    "verbosity": ["low", "high"],
    "web_search_options": [{}],
}
COMPLETION_ACCEPTED: dict[str, list[Any]] = {
    **{
        name: ACCEPTED[name]
        for name in (
            "frequency_penalty",
            "logit_bias",
            "max_tokens",
            "n",
            "presence_penalty",
            "seed",
            "stop",
            "stream",
            "stream_options",
            "temperature",
            "top_p",
            "user",
            "model",
        )
    },
    "prompt": ["x", ""],
    "best_of": [1],
    "echo": [False, True],
    "logprobs": [0, 5],
    "suffix": [""],
}
COMPLETION_REFUSED: dict[str, list[Any]] = {
    "prompt": [None, ["a", "b"], [1, -2], [[1]]],
    "best_of": [2, True],
    "echo": ["yes"],
    "logprobs": [True, 21],
    "suffix": ["end"],
}
NEEDS: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True},
    "stream_options": {"stream": True},
}
BODIES: dict[Any, dict[str, Any]] = {
    "chat": {"model": "m", "messages": [{"role": "user", "content": "x"}]},
    "completion": {"model": "m", "prompt": "x"},
}


def read(kind: Any, **fields: Any) -> SamplingParams:
    """Parse a body as the server and an embedded engine do, up to sampling.

    Raises:
        InvalidRequest: as the client gets it.
    """
    body = {**BODIES[kind], **fields}
    stream_options(body)
    request = parse_request(body, kind, {})
    plan = make_plan(request, Fake().load(), {}, {}, Limits(16, 100_000))
    return SamplingParams.from_body(plan.draws[0].body, kind)


def values(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}={value}"[:60])
        for name, fields in table.items()
        for value in fields
    ]


def test_every_field_of_the_sdk_is_in_these_tables() -> None:
    chat = {*get_type_hints(chat_create_params.CompletionCreateParamsNonStreaming)}
    assert chat == {*ACCEPTED, *REFUSED}
    completion = {*get_type_hints(completion_create_params.CompletionCreateParamsNonStreaming)}
    assert completion == {*COMPLETION_ACCEPTED}
    neutral = {"metadata", "model", "safety_identifier", "user", "tool_choice"}
    cache = {name for name in chat if name.startswith("prompt_cache")}
    assert {name for name in chat if not REFUSED.get(name)} == neutral | cache, "taken at any value"


@pytest.mark.parametrize(("name", "value"), values(ACCEPTED))
def test_chat_accepts(name: str, value: Any) -> None:
    read("chat", **NEEDS.get(name, {}), **{name: value})


@pytest.mark.parametrize(("name", "value"), values(REFUSED))
def test_chat_refuses_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name) as refused:
        read("chat", **NEEDS.get(name, {}), **{name: value})
    assert (refused.value.param or "").startswith(name)


@pytest.mark.parametrize(("name", "value"), values(COMPLETION_ACCEPTED))
def test_completion_accepts(name: str, value: Any) -> None:
    read("completion", **NEEDS.get(name, {}), **{name: value})


@pytest.mark.parametrize(("name", "value"), values(COMPLETION_REFUSED))
def test_completion_refuses_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name) as refused:
        read("completion", **{name: value})
    assert (refused.value.param or "").startswith(name)


@pytest.mark.parametrize("name", sorted({*ACCEPTED} - {"messages"}))
def test_null_is_absent(name: str) -> None:
    assert read("chat", **{name: None}) == read("chat")


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_an_unknown_field_is_refused_with_the_nearest(kind: Any) -> None:
    with pytest.raises(Unsupported, match="did you mean 'temperature'") as refused:
        read(kind, temprature=1)
    assert refused.value.code == "unknown_field"


def test_tool_choice_counts_only_beside_tools() -> None:
    read("chat", tool_choice="required", tools=[])
    with pytest.raises(Unsupported, match="tool"):
        read("chat", tool_choice="required", tools=TOOLS)


@pytest.mark.parametrize(
    ("kind", "accepted", "refused"),
    [("chat", ACCEPTED, REFUSED), ("completion", COMPLETION_ACCEPTED, COMPLETION_REFUSED)],
)
def test_the_schemas_say_the_same(kind: Any, accepted: Any, refused: Any) -> None:
    schemas = field_schemas(kind)
    for name, schema in schemas.items():
        valid = jsonschema.Draft202012Validator(schema).is_valid
        assert valid(None), f"{name}: null is absent"
        for value in accepted.get(name, []):
            assert valid(value), (name, value)
        for value in refused.get(name, []):
            assert not valid(value), (name, value)
    ours = {"messages", "prompt", "model", "n", "seed", "stream", "stream_options", "tool_choice"}
    assert {*accepted, *refused} - ours <= {*schemas}


def test_the_fake_engine_describes_what_it_reads() -> None:
    engine = Fake().load()
    for name, schema in engine.field_schemas("chat").items():
        for value in (-(10**6), "x", [1]):
            if not jsonschema.Draft202012Validator(schema).is_valid(value):
                with pytest.raises(InvalidRequest, match=name):
                    engine.check(Draw({**BODIES["chat"], name: value}))
