"""Use langchain-openai on one engine with a real model; see `tests.clients.engine.describe`."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Literal

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

from infer_align_client import extra_body

ENGINE = json.loads(sys.argv[1])
OPTIONS: dict[str, Any] = {
    "model": ENGINE["model"],
    "base_url": ENGINE["url"],
    "api_key": ENGINE["key"],
    "max_retries": 0,
    "timeout": 100,
    "seed": 1,
}
BODIES = ({}, extra_body(best_of_n={"n": 2}, rewards={"brevity": 1.0}))
PROMPTS = ["an owl eats", "the colour of a crow is"]


@tool
def Weather(city: Literal["Oslo", "Rome"]) -> str:
    """How warm it is."""
    return f"4 degrees in {city}"


class Report(BaseModel):
    """Structured output."""

    city: Literal["Oslo", "Rome"]
    sky: Literal["blue", "grey"]


def complete(**options: Any) -> list[list[str]]:
    """Return the texts of two prompts, which langchain sends as one list."""
    result = OpenAI(**OPTIONS, max_tokens=6, **options).generate(PROMPTS)
    assert result.llm_output["token_usage"]["completion_tokens"] > 0
    return [[generation.text for generation in each] for each in result.generations]


def loop(chat: ChatOpenAI, tool_choice: str, *, streams: bool) -> None:
    """Let the model call a tool, run the tool, and let the model answer."""
    turns: list[object] = [SystemMessage("be brief"), HumanMessage("how warm is it?")]
    bound = chat.bind_tools([Weather], strict=True, tool_choice=tool_choice)
    message: Any = bound.invoke(turns)
    if streams:
        first, *others = bound.stream(turns)
        message = sum(others, first)
    assert isinstance(message, AIMessage)
    assert message.tool_calls, message
    assert message.tool_calls[0]["args"]["city"] in {"Oslo", "Rome"}, message
    turns.append(message)
    turns += [Weather.invoke(each) for each in message.tool_calls]
    assert isinstance(turns[-1], ToolMessage)
    final = chat.bind_tools([Weather], strict=True, tool_choice="none").invoke(turns)
    assert final.content, final
    assert not final.tool_calls, final


for body in BODIES:
    short = ChatOpenAI(**OPTIONS, extra_body=body, max_tokens=6, temperature=0)
    whole = short.invoke([SystemMessage("be brief"), HumanMessage("what is an owl?")])
    pieces = short.stream([SystemMessage("be brief"), HumanMessage("what is an owl?")])
    assert "".join(str(piece.content) for piece in pieces) == whole.content
    long = ChatOpenAI(**OPTIONS, **ENGINE["fields"], extra_body=body, max_tokens=100)
    for choice in ("Weather", "required"):
        for streams in (False, True):
            loop(long, choice, streams=streams)
    for method in ("json_schema", "function_calling"):
        structured = long.with_structured_output(Report, method=method, strict=True).invoke(
            "how is it?"
        )
        assert isinstance(structured, Report), (method, structured)

    greedy = complete(temperature=0, extra_body=body)
    assert [len(texts) for texts in greedy] == [1, 1], greedy
    alone = OpenAI(**OPTIONS, max_tokens=6, temperature=0, extra_body=body)
    assert alone.invoke(PROMPTS[0]) == greedy[0][0]
    assert "".join(alone.stream(PROMPTS[0])) == greedy[0][0]
assert [len(texts) for texts in complete(n=2)] == [2, 2]

try:
    ChatOpenAI(**{**OPTIONS, "model": "nobody"}).invoke("hello")
except openai.NotFoundError as error:
    assert error.message  # noqa: PT017
else:
    raise AssertionError("the model does not exist")


async def asynchronous() -> None:
    answers = await ChatOpenAI(**OPTIONS, extra_body=BODIES[1], max_tokens=6).abatch(["hello"] * 4)
    assert len(answers) == 4
    text = ""
    async for chunk in ChatOpenAI(**OPTIONS, max_tokens=6).astream("hello"):
        text += str(chunk.content)
    assert text


asyncio.run(asynchronous())
print("ok")
