"""Use LiteLLM on one engine with a real model; see `tests.clients.engine.describe`."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import litellm

from infer_align_client import extra_body

ENGINE = json.loads(sys.argv[1])
USER = [{"role": "user", "content": "What is the colour of the owl?"}]
COMMON: dict[str, Any] = {
    "model": f"openai/{ENGINE['model']}",
    "messages": USER,
    "api_base": ENGINE["url"],
    "api_key": ENGINE["key"],
    "num_retries": 0,
    "timeout": 100,
    "seed": 1,
}
BODIES = ({}, extra_body(best_of_n={"n": 2}, rewards={"brevity": 1.0}))
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "Weather", "strict": True, "parameters": CITY}}]
NAMED = {"type": "function", "function": {"name": "Weather"}}
FORM = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}


def text_of(pieces: Any) -> str:
    return "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)


for body in BODIES:
    short = {**COMMON, "max_tokens": 6, "temperature": 0, "extra_body": body}
    whole = litellm.completion(**short)
    assert whole.usage.completion_tokens > 0
    assert text_of(litellm.completion(**short, stream=True)) == whole.choices[0].message.content

    long = {**COMMON, "max_tokens": 100, "extra_body": body, **ENGINE["fields"]}
    for choice in (NAMED, "required"):
        called = litellm.completion(**long, tools=TOOLS, tool_choice=choice).choices[0].message
        call = called.tool_calls[0]
        assert call.function.name == "Weather", called
        assert json.loads(call.function.arguments)["city"] in {"Oslo", "Rome"}, called
        results = [
            {"role": "tool", "tool_call_id": each.id, "content": "4"} for each in called.tool_calls
        ]
        turns = [*USER, called.model_dump(), *results]
        final = litellm.completion(**{**long, "messages": turns}, tools=TOOLS, tool_choice="none")
        assert final.choices[0].message.content, final
        pieces = list(litellm.completion(**long, tools=TOOLS, tool_choice=choice, stream=True))
        (call, *_) = litellm.stream_chunk_builder(pieces).choices[0].message.tool_calls
        assert call.function.name == "Weather", call
        assert json.loads(call.function.arguments)["city"] in {"Oslo", "Rome"}, call
    formed = litellm.completion(**long, response_format=FORM)
    assert json.loads(formed.choices[0].message.content)["city"] in {"Oslo", "Rome"}
    streamed = text_of(litellm.completion(**long, response_format=FORM, stream=True))
    assert json.loads(streamed)["city"] in {"Oslo", "Rome"}, streamed

    fields = {key: value for key, value in short.items() if key != "messages"}
    fields["model"] = f"text-completion-openai/{ENGINE['model']}"
    texts = litellm.text_completion(prompt=["an owl eats", "a crow is"], **fields)
    assert [choice.index for choice in texts.choices] == [0, 1], texts
    alone = litellm.text_completion(prompt="a crow is", **fields)
    assert alone.choices[0].text == texts.choices[1].text, (alone, texts)

for kind, wrong in (
    (litellm.NotFoundError, {"model": "openai/nobody"}),
    (litellm.BadRequestError, {"temperature": -9}),
):
    try:
        litellm.completion(**{**COMMON, **wrong})
    except kind as error:
        assert str(error)  # noqa: PT017
    else:
        raise AssertionError(wrong)


async def asynchronous() -> None:
    calls = [litellm.acompletion(**COMMON, max_tokens=6, extra_body=body) for body in BODIES * 2]
    for answer in await asyncio.gather(*calls):
        assert answer.choices[0].message.role == "assistant"


asyncio.run(asynchronous())
print("ok")
