"""A tool call that the model begins by itself fits the schema of its function.

The random model of these tests begins calls because a logit bias makes it write one token, which
holds the beginning of a call.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from infer_align.decoding.stream import ChoiceBuilder
from infer_align.errors import InvalidRequest

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

MARKER = "<tool_call>"
# The prompt does not show the schemas, so that answers to requests with others can be compared.
TEMPLATE = (
    "{% if tools %}FORM{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)
SMALL = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x"]}},
    "required": ["a", "b"],
}
FLAG = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
# llguidance does not know this keyword.
ODD = {"type": "object", "not": {"type": "string"}}


def tools_of(**schemas: Any) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in schemas.items()
    ]


@pytest.fixture(scope="module")
def calling(language_model: Any, byte_level: Any, serving: Any) -> Callable[..., Any]:
    """`calling("<tool_call>")`: a served model with such a token, and the form that it shows."""
    models: dict[tuple[str, str, bool], str] = {}
    # `language_model` knows tokenizers by their identity, so they must live as long as it.
    tokenizers = []

    def serve(token: str, form: str = MARKER, *, special: bool = False) -> Any:
        key = (token, form, special)
        if key not in models:
            tokenizer = copy.deepcopy(byte_level)
            tokenizer.add_tokens([token], special_tokens=special)
            tokenizer.chat_template = TEMPLATE.replace("FORM", form)
            tokenizers.append(tokenizer)
            models[key] = language_model("Llama", tokenizer, max_position_embeddings=4096)
        return serving(model=models[key])

    return serve


def bias(engine: Any, token: str, value: float = 100.0) -> dict[str, float]:
    """Return a logit bias towards a token."""
    return {str(engine._started.model.tokenizer.convert_tokens_to_ids(token)): value}


def arguments_of(candidate: Any, schemas: dict[str, Any]) -> list[Any]:
    """Check the calls of a candidate against their schemas, and return their arguments."""
    parsed = []
    for call in candidate.choice["message"].get("tool_calls", ()):
        content = json.loads(call["function"]["arguments"])
        jsonschema.validate(content, schemas[call["function"]["name"]])
        parsed.append(content)
    return parsed


@pytest.mark.parametrize(
    ("token", "form"),
    [
        (MARKER, MARKER),
        # Tokens that hold the marker and the text behind it.
        (MARKER + "\n", MARKER),
        (MARKER + '\n{"', MARKER),
        (MARKER + '{"name": "small", "arg', MARKER),
        ("[TOOL_CALLS]", "[TOOL_CALLS]"),
        ("[TOOL_CALLS] [", "[TOOL_CALLS]"),
        # Without a marker, a call is certain once its name is there, in any white space.
        ('{"name": "small", "parameters": {', "<|python_tag|>"),
        ('{"name":"flag","parameters":{', "<|python_tag|>"),
        ('\n{ "name" : "flag", "parameters" :  {"on"', "<|python_tag|>"),
    ],
)
async def test_a_call_that_has_begun_fits_its_schema(
    calling: Any, draw: Any, token: str, form: str
) -> None:
    schemas = {"small": SMALL, "flag": FLAG}
    fields = {"tools": tools_of(**schemas), "max_tokens": 120, "parallel_tool_calls": False}
    async with calling(token, form) as engine:
        request = draw(n=6, logit_bias=bias(engine, token), **fields)
        engine.check(request)
        for candidate in await engine.generate(request):
            assert candidate.finish_reason == "tool_calls", candidate
            assert candidate.choice["message"]["content"] is None
            assert len(arguments_of(candidate, schemas)) == 1


async def test_a_special_token_begins_a_call_too(calling: Any, draw: Any) -> None:
    token = "[TOOL_CALLS]"
    async with calling(token, token, special=True) as engine:
        request = draw(
            n=4, max_tokens=200, tools=tools_of(flag=FLAG), logit_bias=bias(engine, token)
        )
        calls = [arguments_of(each, {"flag": FLAG}) for each in await engine.generate(request)]
    assert all(calls)


async def test_several_calls_fit_their_schemas(calling: Any, draw: Any) -> None:
    schemas = {"small": SMALL, "flag": FLAG}
    async with calling(MARKER) as engine:
        request = draw(
            n=8, max_tokens=400, tools=tools_of(**schemas), logit_bias=bias(engine, MARKER)
        )
        counts = set()
        for candidate in await engine.generate(request):
            if candidate.finish_reason == "tool_calls":
                counts.add(len(arguments_of(candidate, schemas)))
            else:
                # The last call of an answer that was cut is not complete.
                candidate.choice["message"]["tool_calls"].pop()
                arguments_of(candidate, schemas)
    assert counts or candidate.finish_reason == "length"


async def test_text_before_a_call_does_not_depend_on_the_schemas(calling: Any, draw: Any) -> None:
    """The text is free: that of requests whose calls are formed in another way, or not at all."""
    async with calling(MARKER) as engine:
        fields = {
            "max_tokens": 60,
            "parallel_tool_calls": False,
            "logit_bias": bias(engine, MARKER, 2.0),
            "logprobs": True,
        }
        outcomes = []
        for schema in (SMALL, FLAG, ODD):
            request = draw(n=16, tools=tools_of(f=schema), **fields)
            engine.check(request)
            outcomes.append(await engine.generate(request))
    called = 0
    for candidates in zip(*outcomes, strict=True):
        entries = [candidate.choice["logprobs"]["content"] for candidate in candidates]
        texts = [[entry["token"] for entry in part] for part in entries]
        free = texts[0].index(MARKER) + 1 if MARKER in texts[0] else len(texts[0])
        assert texts[0][:free] == texts[1][:free] == texts[2][:free]
        if candidates[0].finish_reason == "tool_calls":
            called += 1
            messages = [candidate.choice["message"] for candidate in candidates]
            contents = [message["content"] for message in messages]
            assert contents[0] == contents[1]
            arguments_of(candidates[0], {"f": SMALL})
    assert 0 < called < 16


@pytest.mark.parametrize("token", [MARKER + "[", MARKER + "hello", MARKER + '{"nome"'])
async def test_text_that_is_no_call_stays_free(calling: Any, draw: Any, token: str) -> None:
    async with calling(token) as engine:
        request = draw(n=3, max_tokens=5, tools=tools_of(f=SMALL), logit_bias=bias(engine, token))
        for candidate in await engine.generate(request):
            assert candidate.error is None
            assert candidate.choice["message"]["content"] == token * 5
            assert candidate.finish_reason == "length"


async def test_a_schema_that_cannot_be_followed_leaves_any_object(calling: Any, draw: Any) -> None:
    schemas = {"odd": ODD, "flag": FLAG}
    async with calling(MARKER) as engine:
        fields = {"max_tokens": 150, "parallel_tool_calls": False}
        request = draw(n=12, tools=tools_of(**schemas), logit_bias=bias(engine, MARKER), **fields)
        engine.check(request)
        finished = [c for c in await engine.generate(request) if c.finish_reason == "tool_calls"]
        assert finished
        for candidate in finished:
            (arguments,) = arguments_of(candidate, {"odd": {"type": "object"}, "flag": FLAG})
            assert isinstance(arguments, dict)
        strict = tools_of(odd=ODD)
        strict[0]["function"]["strict"] = True
        with pytest.raises(InvalidRequest) as refused:
            engine.check(draw(tools=strict))
    assert refused.value.param == "tools[0].function.parameters"


async def test_a_stop_string_that_holds_text_back_does_not_spoil_the_call(
    calling: Any, draw: Any
) -> None:
    async with calling(MARKER + "\n") as engine:
        request = draw(
            n=4,
            max_tokens=120,
            tools=tools_of(f=SMALL),
            parallel_tool_calls=False,
            stop=["\n\n", '{"name": "g"'],
            logit_bias=bias(engine, MARKER + "\n"),
        )
        for candidate in await engine.generate(request):
            assert candidate.finish_reason == "tool_calls"
            assert len(arguments_of(candidate, {"f": SMALL})) == 1


async def test_deltas_of_a_begun_call_add_up(calling: Any, draw: Any, finish: Any) -> None:
    async with calling(MARKER) as engine:
        fields = {"tools": tools_of(f=SMALL), "parallel_tool_calls": False, "max_tokens": 120}
        request = draw(n=3, logit_bias=bias(engine, MARKER), **fields)
        candidates, deltas = await finish(engine, request)
        for candidate in candidates:
            builder = ChoiceBuilder("chat")
            for delta in deltas:
                if delta.index == candidate.index:
                    builder.add(delta.choice)
            built = builder.choice()["message"]
            assert built["tool_calls"] == candidate.choice["message"]["tool_calls"]
