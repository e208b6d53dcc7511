"""Use OpenAI's SDK on one engine with a real model; see `tests.clients.engine.describe`."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Literal

import openai
from pydantic import BaseModel

from infer_align_client import extra_body, report

ENGINE = json.loads(sys.argv[1])
MODEL = ENGINE["model"]
OPTIONS = {
    "base_url": ENGINE["url"],
    "api_key": ENGINE["key"],
    "max_retries": 0,
    "timeout": 100,
}
USER = [{"role": "user", "content": "What is the colour of the owl?"}]
BODIES = ({}, extra_body(best_of_n={"n": 2}, rewards={"brevity": 1.0}))


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Oslo", "Rome"]
    sky: Literal["blue", "grey"]


SCHEMA = {**Weather.model_json_schema(), "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "weather"}}


def answers(sdk: openai.OpenAI, body: dict[str, Any]) -> None:
    fields = {"model": MODEL, "messages": USER, "max_tokens": 8, "temperature": 0, "seed": 1}
    whole = sdk.chat.completions.create(**fields, extra_body=body)
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.completion_tokens > 0
    assert (report(whole) is not None) == bool(body)
    chunks = list(
        sdk.chat.completions.create(
            **fields, extra_body=body, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content, (text, whole)
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    history = [*USER, {"role": "assistant", "content": text or "Brown."}, *USER]
    again = sdk.chat.completions.create(**{**fields, "messages": history}, extra_body=body)
    assert again.usage.prompt_tokens > whole.usage.prompt_tokens
    raw = sdk.chat.completions.with_raw_response.create(**fields, extra_body=body)
    assert raw.headers["x-request-id"]


def lists_of_prompts(sdk: openai.OpenAI, body: dict[str, Any]) -> None:
    fields = {"model": MODEL, "max_tokens": 6, "temperature": 0, "seed": 1, "extra_body": body}
    prompts = ["an owl eats", "the colour of a crow is"]
    together = sdk.completions.create(prompt=prompts, **fields)
    assert [choice.index for choice in together.choices] == [0, 1], together
    alone = sdk.completions.create(prompt=prompts[1], **fields)
    assert alone.choices[0].text == together.choices[1].text
    streamed = ["", ""]
    for chunk in sdk.completions.create(prompt=prompts, stream=True, **fields):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in together.choices]


def structure(sdk: openai.OpenAI, body: dict[str, Any]) -> None:
    parse = getattr(sdk.chat.completions, "parse", None) or sdk.beta.chat.completions.parse
    fields = {"model": MODEL, "messages": USER, "max_tokens": 100, "extra_body": body}
    parsed = parse(response_format=Weather, **fields).choices[0].message.parsed
    assert isinstance(parsed, Weather), parsed
    open_stream = getattr(sdk.chat.completions, "stream", None) or sdk.beta.chat.completions.stream
    with open_stream(response_format=Weather, **fields) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Weather), final


def tools(sdk: openai.OpenAI, body: dict[str, Any]) -> None:
    fields = {"model": MODEL, "tools": [TOOL], "max_tokens": 100, "seed": 1, "extra_body": body}
    fields |= ENGINE["fields"]
    for choice in (NAMED, "required"):
        turns: list[Any] = list(USER)
        answer = sdk.chat.completions.create(messages=turns, tool_choice=choice, **fields)
        message = answer.choices[0].message
        first = message.tool_calls[0]
        assert first.function.name == "weather"
        Weather.model_validate_json(first.function.arguments)
        turns.append(message.model_dump())
        for call in message.tool_calls:
            turns.append({"role": "tool", "tool_call_id": call.id, "content": "4 degrees"})
        final = sdk.chat.completions.create(messages=turns, tool_choice="none", **fields)
        assert final.choices[0].message.content, final
        assert not final.choices[0].message.tool_calls, final
        chunks = sdk.chat.completions.create(
            messages=USER, tool_choice=choice, stream=True, **fields
        )
        arguments, reason = streamed_call(chunks)
        Weather.model_validate_json(arguments)
        assert reason == answer.choices[0].finish_reason, reason
        open_stream = (
            getattr(sdk.chat.completions, "stream", None) or sdk.beta.chat.completions.stream
        )
        with open_stream(messages=USER, tool_choice=choice, **fields) as stream:
            for _ in stream:
                pass
            (call, *_) = stream.get_final_completion().choices[0].message.tool_calls
        Weather.model_validate_json(call.function.arguments)
    for parallel in (True, False):
        answer = sdk.chat.completions.create(
            messages=USER, tool_choice="required", parallel_tool_calls=parallel, **fields
        )
        calls = answer.choices[0].message.tool_calls
        assert parallel or len(calls) == 1, calls
        for call in calls:
            Weather.model_validate_json(call.function.arguments)


def streamed_call(chunks: Any) -> tuple[str, str]:
    """Return the arguments of the first call in a stream, and the reason why the stream ended."""
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    pieces = [piece for choice in choices for piece in choice.delta.tool_calls or ()]
    firsts = [piece for piece in pieces if piece.index == pieces[0].index]
    assert firsts[0].id
    assert firsts[0].function.name == "weather"
    assert not "".join(choice.delta.content or "" for choice in choices)
    (reason,) = [choice.finish_reason for choice in choices if choice.finish_reason]
    return "".join(each.function.arguments or "" for each in firsts), reason


def errors(sdk: openai.OpenAI) -> None:
    for kind, fields in (
        (openai.NotFoundError, {"model": "nobody"}),
        (openai.BadRequestError, {"temperature": -9}),
        (openai.BadRequestError, {"max_tokens": 0}),
        (openai.BadRequestError, {"extra_body": {"align": {"best_of": {}}}}),
    ):
        try:
            sdk.chat.completions.create(**{"model": MODEL, "messages": USER, **fields})
        except kind as error:
            assert error.message  # noqa: PT017
            assert error.request_id  # noqa: PT017
        else:
            raise AssertionError(fields)


async def asynchronous() -> None:
    async with openai.AsyncOpenAI(**OPTIONS) as sdk:
        calls = [
            sdk.chat.completions.create(
                model=MODEL, messages=USER, max_tokens=8, seed=1, extra_body=BODIES[i % 2]
            )
            for i in range(6)
        ]
        results = await asyncio.gather(*calls)
    assert [report(answer) is not None for answer in results] == [False, True] * 3


with openai.OpenAI(**OPTIONS) as common:
    assert MODEL in [model.id for model in common.models.list()]
    for each in BODIES:
        answers(common, each)
        lists_of_prompts(common, each)
        structure(common, each)
        tools(common, each)
    errors(common)
asyncio.run(asynchronous())
print("ok", openai.__version__)
