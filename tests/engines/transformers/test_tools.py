"""Tests of tools in the embedded engine: forced calls fit their schemas, free calls are found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from infer_align.decoding.stream import ChoiceBuilder
from infer_align.errors import InvalidRequest
from infer_align.types import Capability, Draw

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

PARAMETERS: dict[str, dict[str, Any]] = {
    "add": {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "minimum": 0, "maximum": 99},
            "b": {"$ref": "#/$defs/small"},
        },
        "required": ["a", "b"],
        "$defs": {"small": {"enum": [1, 2, 3]}},
    },
    "say": {
        "type": "object",
        "properties": {"text": {"type": "string", "maxLength": 5}},
        "required": ["text"],
    },
    "stop": {"type": "object", "properties": {}},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in PARAMETERS.items()
]
HERMES = (
    "{% if tools %}{{ tools | tojson }}<tool_call></tool_call>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)
MISTRAL = HERMES.replace("<tool_call></tool_call>", "[TOOL_CALLS]")
LLAMA = HERMES.replace("<tool_call></tool_call>", "<|python_tag|>")


def name_tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.fixture
def with_template(language_model: Any, tmp_path: Path) -> Any:
    """Return the folder of a tiny model with this chat template."""

    def make(template: str | None) -> str:
        folder = tmp_path / "model"
        shutil.copytree(language_model(max_position_embeddings=4096), folder, dirs_exist_ok=True)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return str(folder)

    return make


def check_calls(message: dict[str, Any], at_most: int = 100) -> None:
    """Check that a finished message consists of calls that fit their schemas."""
    assert message["content"] is None
    assert 1 <= len(message["tool_calls"]) <= at_most
    for call in message["tool_calls"]:
        assert call["type"] == "function"
        assert call["id"].isalnum()
        schema = PARAMETERS[call["function"]["name"]]
        jsonschema.validate(json.loads(call["function"]["arguments"]), schema)


@pytest.mark.parametrize("template", [None, HERMES, MISTRAL, LLAMA])
@pytest.mark.parametrize("parallel", [True, False])
async def test_a_required_call_fits_its_schema(
    serving: Any, draw: Any, with_template: Any, template: str | None, parallel: bool
) -> None:
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": parallel}
    several = parallel and template in (HERMES, MISTRAL)
    async with serving(model=with_template(template)) as engine:
        assert Capability.TOOLS in engine.capabilities
        request = draw(n=12, max_tokens=300, **fields)
        engine.check(request)
        finished = 0
        for candidate in await engine.generate(request):
            assert candidate.error is None
            if candidate.finish_reason != "length":
                finished += 1
                assert candidate.finish_reason == "tool_calls"
                check_calls(candidate.choice["message"], 100 if several else 1)
        assert finished >= 8


async def test_a_named_tool_is_called_once_and_ends_with_stop(
    serving: Any, with_template: Any, draw: Any
) -> None:
    async with serving(model=with_template(None)) as engine:
        for name in PARAMETERS:
            request = draw(n=4, max_tokens=60, tools=TOOLS[:], tool_choice=name_tool(name))
            request = Draw({**request.body, "tools": _one(name)}, 4, (1, 2, 3, 4))
            engine.check(request)
            for candidate in await engine.generate(request):
                assert candidate.finish_reason == "stop"
                check_calls(candidate.choice["message"], 1)
                (call,) = candidate.choice["message"]["tool_calls"]
                assert call["function"]["name"] == name


def _one(name: str) -> list[dict[str, Any]]:
    return [tool for tool in TOOLS if tool["function"]["name"] == name]


async def test_deltas_add_up_to_the_message(
    serving: Any, with_template: Any, draw: Any, finish: Any
) -> None:
    fields = {"tools": _one("say"), "tool_choice": "required", "logprobs": True}
    async with serving(model=with_template(None)) as engine:
        candidates, deltas = await finish(engine, draw(n=3, max_tokens=60, **fields))
        for candidate in candidates:
            check_calls(candidate.choice["message"], 1)
            builder = ChoiceBuilder("chat")
            pieces = [delta.choice for delta in deltas if delta.index == candidate.index]
            assert len(pieces) > 3, "arguments are streamed as they arrive"
            entries = []
            for piece in pieces:
                builder.add(piece)
                entries += piece["logprobs"]["content"]
            built = builder.choice()["message"]
            assert built["tool_calls"] == candidate.choice["message"]["tool_calls"]
            assert entries == candidate.choice["logprobs"]["content"]
            assert len(entries) == candidate.completion_tokens


async def test_a_seed_gives_the_same_call_and_another_prompt_another_id(
    serving: Any, with_template: Any, draw: Any
) -> None:
    fields = {"tools": _one("say"), "tool_choice": "required", "max_tokens": 60}
    async with serving(model=with_template(None)) as engine:
        (first,) = await engine.generate(draw(seed=4, **fields))
        (again,) = await engine.generate(draw(seed=4, **fields))
        (other,) = await engine.generate(draw("the dog", seed=4, **fields))
    assert first.choice == again.choice
    ids = [c.choice["message"]["tool_calls"][0]["id"] for c in (first, other)]
    assert ids[0] != ids[1]


async def test_a_cut_call_ends_with_length(serving: Any, with_template: Any, draw: Any) -> None:
    async with serving(model=with_template(None)) as engine:
        request = draw(max_tokens=4, tools=_one("say"), tool_choice=name_tool("say"))
        (candidate,) = await engine.generate(request)
    assert candidate.finish_reason == "length"
    (call,) = candidate.choice["message"]["tool_calls"]
    assert '{"text": "'.startswith(call["function"]["arguments"][:10])


async def test_a_free_answer_is_content_and_a_free_call_is_found(
    serving: Any, draw: Any, with_template: Any
) -> None:
    async with serving(model=with_template(HERMES)) as engine:
        (plain,) = await engine.generate(draw(max_tokens=8, tools=_one("say")))
        assert plain.choice["message"]["content"]
        assert "tool_calls" not in plain.choice["message"]
        # The response format makes the random model write a call.
        text = 'hello\\n<tool_call>\\n{"name": "say", "arguments": {"text": "x"}}\\n</tool_call>'
        grammar = f'root ::= "{text.replace(chr(34), chr(92) + chr(34))}"'
        request = draw(max_tokens=120, tools=_one("say"), structured_outputs={"grammar": grammar})
        engine.check(request)
        (called,) = await engine.generate(request)
    message = called.choice["message"]
    assert (message["content"], called.finish_reason) == ("hello", "tool_calls")
    assert message["tool_calls"][0]["function"] == {"name": "say", "arguments": '{"text": "x"}'}


async def test_tools_and_their_results_reach_the_prompt(
    serving: Any, draw: Any, with_template: Any
) -> None:
    call = {"id": "abc", "type": "function", "function": {"name": "say", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abc", "content": "done"},
    ]
    body = {"messages": messages, "tools": TOOLS, "max_tokens": 2}
    # This template knows no tools: they are described, and calls are text.
    async with serving(model=with_template(None)) as engine:
        engine.check(Draw(body, 1, (0,)))
        (described,) = await engine.generate(Draw(body, 1, (0,)))
        (without,) = await engine.generate(Draw({**body, "tool_choice": "none"}, 1, (0,)))
        assert described.prompt_tokens > without.prompt_tokens + 300
    async with serving(model=with_template(HERMES)) as engine:
        (templated,) = await engine.generate(Draw(body, 1, (0,)))
        (bare,) = await engine.generate(Draw({**body, "tool_choice": "none"}, 1, (0,)))
        assert templated.prompt_tokens > bare.prompt_tokens + 300


REFUSED: dict[str, dict[str, Any]] = {
    "tool_choice.function.name": {"tools": TOOLS, "tool_choice": name_tool("nope")},
    "tool_choice": {"tool_choice": "required"},
    "tools[0].function.name": {"tools": [{"type": "function", "function": {}}]},
    "tools[0].function.parameters": {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}],
        "tool_choice": "required",
    },
    "structured_outputs": {
        "tools": TOOLS,
        "tool_choice": "required",
        "structured_outputs": {"regex": "a"},
    },
    "functions": {"functions": [{"name": "f"}]},
}


@pytest.mark.parametrize("param", REFUSED)
async def test_wrong_tools_are_refused_before_anything_is_drawn(
    serving: Any, with_template: Any, draw: Any, param: str
) -> None:
    async with serving(model=with_template(None)) as engine:
        with pytest.raises(InvalidRequest) as refused:
            engine.check(draw(**REFUSED[param]))
        with pytest.raises(InvalidRequest):
            engine.check(draw(kind="completion", tools=TOOLS))
    assert refused.value.param == param
