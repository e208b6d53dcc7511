"""What a program with instructor does; run with the urls of the servers as JSON."""

from __future__ import annotations

import asyncio
import json
import sys

import instructor
import openai
from pydantic import BaseModel

from infer_align_client import extra_body

URLS = json.loads(sys.argv[1])
USER = [{"role": "user", "content": "how warm is it in Oslo?"}]
BEST = extra_body(best_of_n={"n": 2})
OPTIONS = {"api_key": "unused", "max_retries": 0, "timeout": 20}


class Weather(BaseModel):
    """Structured output."""

    city: str
    degrees: int


WANTED = Weather(city="Oslo", degrees=4)

for url, mode in (
    (URLS["tools"], instructor.Mode.TOOLS),
    (URLS["json"], instructor.Mode.JSON),
    (URLS["json"], instructor.Mode.JSON_SCHEMA),
    (URLS["upstream_tools"], instructor.Mode.TOOLS),
    (URLS["upstream_json"], instructor.Mode.JSON_SCHEMA),
):
    client = instructor.from_openai(openai.OpenAI(base_url=url, **OPTIONS), mode=mode)
    for body in ({}, BEST):
        answer = client.chat.completions.create(
            model="fake",
            messages=list(USER),
            response_model=Weather,
            max_retries=0,
            extra_body=body,
        )
        assert answer.model_dump() == WANTED.model_dump(), (mode, body, answer)


async def asynchronous() -> None:
    async with openai.AsyncOpenAI(base_url=URLS["tools"], **OPTIONS) as sdk:
        client = instructor.from_openai(sdk, mode=instructor.Mode.TOOLS)
        answer = await client.chat.completions.create(
            model="fake", messages=list(USER), response_model=Weather, extra_body=BEST
        )
        assert answer.model_dump() == WANTED.model_dump()


asyncio.run(asynchronous())
print("ok")
