"""Structured outputs and tools of the embedded engine, used from the OpenAI SDK."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

pytestmark = pytest.mark.slow

CONFIG = """
[engine]
kind = "transformers"
model = "demo"
[rewards.brief]
kind = "rules"
words_weight = -1.0
"""
USER: Any = [{"role": "user", "content": "Describe an owl."}]
BEST: Any = {"align": {"best_of_n": {"n": 8}, "rewards": {"brief": 1.0}}}
FREE: Any = {}


class Home(BaseModel):
    """A part of an answer."""

    tree: bool
    height: int = Field(ge=0, le=40)


class Bird(BaseModel):
    """The form of an answer."""

    name: str = Field(max_length=12)
    size: Literal["small", "large"]
    home: Home
    active: list[Literal["day", "night"]] = Field(max_length=3)


SCHEMA: Any = {
    "type": "json_schema",
    "json_schema": {"name": "bird", "schema": Bird.model_json_schema(), "strict": True},
}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "note",
            "description": "Note a home.",
            "parameters": Home.model_json_schema(),
        },
    }
]
NAMED: Any = {"type": "function", "function": {"name": "note"}}


@pytest.fixture(scope="module")
def live(serve: Callable[[str], Any]) -> Any:
    return serve(CONFIG)


@pytest.fixture
def client(live: Any) -> Any:
    with openai.OpenAI(base_url=live.base_url, api_key="unused", max_retries=0, timeout=100) as sdk:
        yield sdk


@pytest.mark.parametrize("extra", [FREE, BEST], ids=["alone", "best-of-8"])
def test_an_answer_is_parsed_into_a_pydantic_model(client: openai.OpenAI, extra: Any) -> None:
    for seed in range(3):
        answer = client.chat.completions.parse(
            model="demo", messages=USER, response_format=Bird, seed=seed, extra_body=extra
        )
        assert isinstance(answer.choices[0].message.parsed, Bird)
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("extra", [FREE, BEST], ids=["alone", "best-of-8"])
def test_a_streamed_answer_fits_too(client: openai.OpenAI, extra: Any) -> None:
    with client.chat.completions.stream(
        model="demo", messages=USER, response_format=Bird, seed=4, extra_body=extra
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Bird)


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("extra", [FREE, BEST], ids=["alone", "best-of-8"])
def test_a_forced_call_fits_its_schema(client: openai.OpenAI, extra: Any, choice: Any) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=USER, tools=TOOLS, tool_choice=choice, seed=1, extra_body=extra
    )
    message = answer.choices[0].message
    assert message.content is None
    assert answer.choices[0].finish_reason == ("tool_calls" if choice == "required" else "stop")
    (call,) = message.tool_calls or ()
    assert call.type == "function"
    Home.model_validate_json(call.function.arguments)
    with client.chat.completions.stream(
        model="demo", messages=USER, tools=TOOLS, tool_choice=choice, seed=1, extra_body=extra
    ) as stream:
        final = stream.get_final_completion()
    (streamed,) = final.choices[0].message.tool_calls or ()
    assert final.choices[0].message.content is None
    assert streamed.function.arguments == call.function.arguments
    assert streamed.id == call.id
    # The answer and the result of the tool go back to the model.
    turns = [
        *USER,
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "written"},
    ]
    again = client.chat.completions.create(model="demo", messages=turns, tools=TOOLS, max_tokens=4)
    assert again.choices[0].finish_reason in {"stop", "length"}


def test_the_structured_outputs_of_vllm_are_followed(client: openai.OpenAI) -> None:
    for outputs in ({"choice": ["owl", "heron"]}, {"regex": "owl|heron"}):
        extra = {**BEST, "structured_outputs": outputs}
        answer = client.chat.completions.create(model="demo", messages=USER, extra_body=extra)
        assert answer.choices[0].message.content in {"owl", "heron"}
        completion = client.completions.create(model="demo", prompt="The ", extra_body=extra)
        assert completion.choices[0].text in {"owl", "heron"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
        ({"tools": TOOLS, "tool_choice": "never"}, "tool_choice"),
        (
            {"response_format": SCHEMA, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
        ),
    ],
)
def test_a_wrong_constraint_is_a_400_that_names_it(live: Any, fields: Any, param: str) -> None:
    answer = live.chat(**fields)
    assert answer.status_code == 400
    assert json.loads(answer.text)["error"]["param"] == param


def test_other_requests_are_answered_while_a_slow_grammar_is_compiled(live: Any) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}
    slow = {"type": "json_schema", "json_schema": {"name": "slow", "schema": schema}}
    answered = 0
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(lambda: live.chat(response_format=slow))
        while not refused.done():
            assert live.get("/health").status_code == 200
            answered += 1
    assert refused.result().status_code == 400
    # A server that waits for the compiler answers one before and one after.
    assert answered > 4
