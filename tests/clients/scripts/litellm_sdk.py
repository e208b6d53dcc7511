"""What a program with LiteLLM does; run with the urls of the servers as JSON."""

from __future__ import annotations

import asyncio
import json
import sys

import litellm

from infer_align_client import extra_body

URLS = json.loads(sys.argv[1])
USER = [{"role": "user", "content": "hello there"}]
BEST = extra_body(best_of_n={"n": 5}, rewards={"number": 1.0}, ensemble={"objective": "mean"})
TOOLS = [
    {
        "type": "function",
        "function": {"name": "Weather", "parameters": {"type": "object", "properties": {}}},
    }
]
COMMON = {
    "model": "openai/fake",
    "messages": USER,
    "api_base": URLS["numbers"],
    "api_key": "unused",
    "num_retries": 0,
}

plain = litellm.completion(**COMMON, max_tokens=8, seed=1)
assert plain.choices[0].message.content == "candidate 3"
assert plain.usage.completion_tokens == 2
best = litellm.completion(**COMMON, extra_body=BEST)
assert best.choices[0].message.content == "candidate 9"
preset = litellm.completion(**{**COMMON, "model": "openai/fake@best"})
assert preset.choices[0].message.content == "candidate 9"

for body in ({}, BEST):
    chunks = list(
        litellm.completion(
            **COMMON, stream=True, stream_options={"include_usage": True}, extra_body=body
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ("candidate 9" if body else "candidate 3"), text

called = litellm.completion(
    **{**COMMON, "api_base": URLS["tools"]}, tools=TOOLS, extra_body=extra_body(best_of_n={"n": 2})
)
assert json.loads(called.choices[0].message.tool_calls[0].function.arguments)["city"] == "Oslo"
assert called.choices[0].finish_reason == "tool_calls"

for kind, fields in (
    (litellm.NotFoundError, {"model": "openai/nobody"}),
    (litellm.BadRequestError, {"temperature": 9}),
    (litellm.AuthenticationError, {"api_base": URLS["keyed"]}),
):
    try:
        litellm.completion(**{**COMMON, **fields})
    except kind as error:
        assert str(error)  # noqa: PT017
    else:
        raise AssertionError(fields)


async def asynchronous() -> None:
    answers = await asyncio.gather(
        *(litellm.acompletion(**COMMON, extra_body=BEST) for _ in range(4))
    )
    assert {answer.choices[0].message.content for answer in answers} == {"candidate 9"}


asyncio.run(asynchronous())
print("ok")
