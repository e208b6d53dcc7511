"""Use instructor on one engine with a real model; see `tests.clients.engine.describe`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable
from typing import Any, Literal

import instructor
import openai
from pydantic import BaseModel, Field

from infer_align_client import extra_body

ENGINE = json.loads(sys.argv[1])
MODEL = ENGINE["model"]
OPTIONS = {
    "base_url": ENGINE["url"],
    "api_key": ENGINE["key"],
    "max_retries": 0,
    "timeout": 100,
}
BODIES = ({}, extra_body(best_of_n={"n": 2}, rewards={"brevity": 1.0}))
EXTRACT = [{"role": "user", "content": "John Doe is 30 years old."}]
# Modes whose requests hold the schema, by which every engine forms the answer.
MODES = [instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA]


class UserInfo(BaseModel):
    """The example of instructor's first page."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


class Pet(BaseModel):
    """A choice and a list."""

    kind: Literal["owl", "crow"]
    ages: list[int] = Field(min_length=2, max_length=2)


class Yes(BaseModel):
    """Agree."""

    sure: bool


class No(BaseModel):
    """Disagree."""

    because: Literal["late", "dark"]


# The engine samples under the schema, so that every answer is valid at the first attempt.
for mode in MODES:
    client = instructor.from_openai(openai.OpenAI(**OPTIONS), mode=mode)
    for body in BODIES:
        for model in (UserInfo, Pet):
            user = client.chat.completions.create(
                model=MODEL,
                messages=list(EXTRACT),
                response_model=model,
                max_retries=0,
                max_tokens=100,
                extra_body=body,
                **ENGINE["fields"],
            )
            assert isinstance(user, model), (mode, body, user)
        partial = client.chat.completions.create_partial(
            model=MODEL,
            messages=list(EXTRACT),
            response_model=UserInfo,
            max_retries=0,
            max_tokens=100,
            extra_body=body,
            **ENGINE["fields"],
        )
        UserInfo.model_validate(list(partial)[-1].model_dump())


def extract(mode: instructor.Mode, model: Any, body: dict[str, Any]) -> Any:
    client = instructor.from_openai(openai.OpenAI(**OPTIONS), mode=mode)
    return client.chat.completions.create(
        model=MODEL,
        messages=list(EXTRACT),
        response_model=model,
        max_retries=0,
        max_tokens=150,
        extra_body=body,
        **ENGINE["fields"],
    )


# These modes only tell the model about the schema. The request forms the answer by fields that
# instructor does not set.
SCHEMA = {"name": "pet", "schema": {**Pet.model_json_schema(), "additionalProperties": False}}
JSON_SCHEMA = {"response_format": {"type": "json_schema", "json_schema": SCHEMA}}
REGEX = r'```json\n\{"kind": "(owl|crow)", "ages": \[[1-9], [1-9]\]\}\n```'
for each in BODIES:
    for mode_name, fields in (
        ("JSON", JSON_SCHEMA),
        ("MD_JSON", {"structured_outputs": {"regex": REGEX}}),
    ):
        pet = extract(instructor.Mode[mode_name], Pet, {**each, **fields})
        assert isinstance(pet, Pet), (mode_name, each, pet)
    # This mode leaves the choice of the tools to the model.
    answers = list(
        extract(
            instructor.Mode.PARALLEL_TOOLS,
            Iterable[Yes | No],
            {**each, "tool_choice": "required"},
        )
    )
    assert answers
    assert all(isinstance(answer, Yes | No) for answer in answers), answers


async def asynchronous() -> None:
    async with openai.AsyncOpenAI(**OPTIONS) as sdk:
        client = instructor.from_openai(sdk, mode=MODES[0])
        answer = await client.chat.completions.create(
            model=MODEL,
            messages=list(EXTRACT),
            response_model=UserInfo,
            max_retries=0,
            max_tokens=100,
            extra_body=BODIES[1],
            **ENGINE["fields"],
        )
        assert isinstance(answer, UserInfo)


asyncio.run(asynchronous())
print("ok")
