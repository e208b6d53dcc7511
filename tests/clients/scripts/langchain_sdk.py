"""What a program with langchain-openai does; run with the urls of the servers as JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Literal

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

from infer_align_client import extra_body

URLS = json.loads(sys.argv[1])
BEST = extra_body(best_of_n={"n": 5}, rewards={"number": 1.0}, ensemble={"objective": "mean"})


def chat(url: str, model: str = "fake", **options: object) -> ChatOpenAI:
    return ChatOpenAI(
        model=model, base_url=url, api_key="unused", max_retries=0, timeout=60, **options
    )


@tool
def Weather(city: Literal["Oslo", "Rome"]) -> str:
    """How warm it is."""
    return f"4 degrees in {city}"


class Report(BaseModel):
    """Structured output."""

    city: str
    degrees: int


assert (
    chat(URLS["numbers"]).invoke([SystemMessage("be brief"), HumanMessage("hello")]).content
    == "candidate 3"
)
assert chat(URLS["numbers"], extra_body=BEST).invoke("hello").content == "candidate 9"
assert chat(URLS["numbers"], "fake@best").invoke("hello").content == "candidate 9"
assert (
    "".join(str(chunk.content) for chunk in chat(URLS["numbers"]).stream("hello")) == "candidate 3"
)
assert (
    "".join(str(chunk.content) for chunk in chat(URLS["numbers"], extra_body=BEST).stream("hello"))
    == "candidate 9"
)

called = (
    chat(URLS["tools"], extra_body=extra_body(best_of_n={"n": 2}))
    .bind_tools([Weather])
    .invoke("how warm is it?")
)
assert isinstance(called, AIMessage)
assert called.tool_calls[0]["args"]["city"] == "Oslo"
answered = ToolMessage("4 degrees", tool_call_id=called.tool_calls[0]["id"])
chat(URLS["tools"]).bind_tools([Weather]).invoke(
    [HumanMessage("how warm is it?"), called, answered]
)
assert chat(URLS["json"]).with_structured_output(Report, method="json_schema").invoke(
    "how warm?"
) == Report(city="Oslo", degrees=4)

for kind, model, url in (
    (openai.NotFoundError, "nobody", URLS["numbers"]),
    (openai.AuthenticationError, "fake", URLS["keyed"]),
):
    try:
        chat(url, model).invoke("hello")
    except kind as error:
        assert error.code  # noqa: PT017
    else:
        raise AssertionError(model)


def complete(url: str, model: str, **options: object) -> list[list[str]]:
    """Return the texts of two prompts, which langchain sends as one list."""
    program = OpenAI(
        model=model, base_url=url, api_key="unused", max_retries=0, max_tokens=6, **options
    )
    result = program.generate(["an owl eats", "the colour of a crow is"])
    assert result.llm_output["token_usage"]["completion_tokens"] > 0
    return [[generation.text for generation in each] for each in result.generations]


for name, model in (("numbers", "fake"), ("upstream_numbers", "fake")):
    url = URLS[name]
    greedy = complete(url, model, temperature=0, seed=3)
    assert [len(texts) for texts in greedy] == [1, 1], (name, greedy)
    assert greedy == complete(url, model, temperature=0, seed=3), name
    drawn = complete(url, model, n=2, seed=3)
    assert [len(texts) for texts in drawn] == [2, 2], (name, drawn)
    aligned = complete(url, model, seed=3, extra_body=extra_body(best_of_n={"n": 2}))
    assert [len(texts) for texts in aligned] == [1, 1], (name, aligned)
    alone = OpenAI(model=model, base_url=url, api_key="unused", max_tokens=6, seed=3, temperature=0)
    assert alone.invoke("an owl eats") == greedy[0][0], name
    assert "".join(alone.stream("an owl eats")) == greedy[0][0], name


def loop(call: ChatOpenAI, answer: ChatOpenAI) -> None:
    """Let the model call a tool, run the tool, and let the model answer."""
    turns: list[object] = [HumanMessage("how warm is it?")]
    message = call.bind_tools([Weather]).invoke(turns)
    assert message.tool_calls, message
    turns.append(message)
    turns += [Weather.invoke(each) for each in message.tool_calls]
    assert isinstance(turns[-1], ToolMessage)
    final = answer.bind_tools([Weather], tool_choice="none").invoke(turns)
    assert final.content, final
    assert not final.tool_calls, final


for body in ({}, extra_body(best_of_n={"n": 2}, rewards={"brevity": 1.0})):
    for caller, answerer in (("tools", "json"), ("upstream_tools", "upstream_json")):
        loop(chat(URLS[caller], extra_body=body), chat(URLS[answerer], extra_body=body))


async def asynchronous() -> None:
    answers = await chat(URLS["numbers"], extra_body=BEST).abatch(["hello"] * 4)
    assert {answer.content for answer in answers} == {"candidate 9"}
    text = ""
    async for chunk in chat(URLS["numbers"]).astream("hello"):
        text += str(chunk.content)
    assert text == "candidate 3"


asyncio.run(asynchronous())
print("ok")
