"""Use OpenAI's SDK, in any version from 1 to 3. The argument is a JSON object of server URLs."""

from __future__ import annotations

import asyncio
import json
import sys

import openai
from pydantic import BaseModel

from infer_align_client import extra_body, report

URLS = json.loads(sys.argv[1])
USER = [{"role": "user", "content": "hello there"}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "Weather", "parameters": {"type": "object", "properties": {}}},
    }
]
BEST = extra_body(best_of_n={"n": 5}, rewards={"number": 1.0}, ensemble={"objective": "mean"})
RESULT = [
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "Weather", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "4 degrees"},
]


class Weather(BaseModel):
    """Structured output."""

    city: str
    degrees: int


def client(url: str, **options: object) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=60, **options)


def chat(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(model="fake", messages=USER, max_tokens=8, seed=1)
    assert answer.choices[0].message.content == "candidate 3"
    assert report(answer) is None
    best = sdk.chat.completions.create(model="fake", messages=USER, extra_body=BEST)
    assert best.choices[0].message.content == "candidate 9"
    assert report(best)["selected"] == 2
    assert best.usage.completion_tokens_details.rejected_prediction_tokens == 8
    preset = sdk.chat.completions.create(model="fake@best", messages=USER)
    assert preset.choices[0].message.content == "candidate 9"
    assert [model.id for model in sdk.models.list()] == ["fake", "fake@best", "fake@three"]
    text = sdk.completions.create(model="fake", prompt="once", max_tokens=8)
    assert text.choices[0].text == "candidate 3"
    raw = sdk.chat.completions.with_raw_response.create(model="fake", messages=USER)
    assert raw.headers["x-request-id"]


def stream(sdk: openai.OpenAI) -> None:
    for body in ({}, BEST):
        options = {"stream": True, "stream_options": {"include_usage": True}, "extra_body": body}
        chunks = list(sdk.chat.completions.create(model="fake", messages=USER, **options))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == ("candidate 9" if body else "candidate 3")
        assert chunks[-1].usage.completion_tokens == (10 if body else 2)
        assert (report(chunks[-1]) is not None) == bool(body)


def tools_and_structure() -> None:
    with client(URLS["tools"]) as sdk:
        for body in ({}, extra_body(best_of_n={"n": 2})):
            answer = sdk.chat.completions.create(
                model="fake", messages=USER, tools=TOOLS, extra_body=body
            )
            call = answer.choices[0].message.tool_calls[0]
            assert (call.function.name, json.loads(call.function.arguments)["city"]) == (
                "Weather",
                "Oslo",
            )
            assert answer.choices[0].finish_reason == "tool_calls"
            sdk.chat.completions.create(
                model="fake", messages=[*USER, *RESULT], tools=TOOLS, extra_body=body
            )
    with client(URLS["json"]) as sdk:
        parse = getattr(sdk.chat.completions, "parse", None) or sdk.beta.chat.completions.parse
        for body in ({}, extra_body(best_of_n={"n": 2})):
            answer = parse(model="fake", messages=USER, response_format=Weather, extra_body=body)
            assert answer.choices[0].message.parsed == Weather(city="Oslo", degrees=4)


def errors(sdk: openai.OpenAI) -> None:
    for kind, fields in (
        (openai.NotFoundError, {"model": "nobody"}),
        (openai.BadRequestError, {"model": "fake", "temperature": 9}),
        (openai.BadRequestError, {"model": "fake", "extra_body": {"align": {"best_of": {}}}}),
    ):
        try:
            sdk.chat.completions.create(messages=USER, **fields)
        except kind as error:
            assert error.code and error.message and error.request_id  # noqa: PT017, PT018
        else:
            raise AssertionError(fields)
    with client(URLS["keyed"]) as stranger:
        try:
            stranger.chat.completions.create(model="fake", messages=USER)
        except openai.AuthenticationError as error:
            assert error.code == "invalid_api_key"  # noqa: PT017
        else:
            raise AssertionError("no key was asked for")


async def asynchronous() -> None:
    async with openai.AsyncOpenAI(
        base_url=URLS["numbers"], api_key="unused", max_retries=0, timeout=60
    ) as sdk:
        answers = await asyncio.gather(
            *(
                sdk.chat.completions.create(
                    model="fake", messages=USER, extra_body=BEST if i % 2 else {}
                )
                for i in range(8)
            )
        )
        assert [answer.choices[0].message.content for answer in answers] == [
            "candidate 3",
            "candidate 9",
        ] * 4
        text = ""
        async for chunk in await sdk.chat.completions.create(
            model="fake@best", messages=USER, stream=True
        ):
            text += chunk.choices[0].delta.content or ""
        assert text == "candidate 9"
    async with openai.AsyncOpenAI(
        base_url=URLS["slow"], api_key="unused", max_retries=0, timeout=60
    ) as sdk:
        task = asyncio.create_task(sdk.chat.completions.create(model="fake", messages=USER))
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        streamed = await sdk.chat.completions.create(model="fake", messages=USER, stream=True)
        assert (await anext(aiter(streamed))).choices
        await streamed.close()


def impatient() -> None:
    # The SDK says so in a header, and the server answers in time. A busy machine may be late by
    # more than the reserve of 0.15 s, but hardly every time.
    with client(URLS["slow"]).with_options(timeout=1.5) as sdk:
        for remaining in reversed(range(10)):
            try:
                answer = sdk.chat.completions.create(model="fake", messages=USER)
            except openai.APITimeoutError:
                assert remaining, "no answer came in time"
            else:
                break
        assert answer.choices[0].finish_reason == "length"


with client(URLS["numbers"]) as common:
    chat(common)
    stream(common)
    errors(common)
tools_and_structure()
asyncio.run(asynchronous())
if hasattr(openai, "__version__") and tuple(map(int, openai.__version__.split(".")[:2])) >= (1, 66):
    impatient()
print("ok", openai.__version__)
