"""The demo's presets do what their names say, through the served flow."""

from __future__ import annotations

import asyncio
from statistics import mean
from typing import Any

import pytest

from infer_align import demo
from infer_align.config import config
from infer_align.demo import world
from infer_align.flow.request import make_plan, parse_request
from infer_align.flow.run import align
from infer_align.types import Response

pytestmark = pytest.mark.slow

QUESTIONS = world.prompts(24, seed=909)


@pytest.fixture(scope="module")
def answered() -> dict[str | None, list[Response]]:
    """Preset -> the response to each question, the same seeds for all; None: no preset."""
    loaded = config.load(None, ["engine.threads=1"])
    engine = loaded.load_engine()
    rewards = loaded.load_rewards({"served": engine})

    async def ask(preset: str | None, i: int, question: str) -> Response:
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 96,
            "seed": i,
        }
        request = parse_request(body, "chat", loaded.presets, preset)
        default = loaded.server.default_rewards
        return await align(
            make_plan(request, engine, rewards, default, loaded.limits.request, loaded.methods),
            engine,
            rewards,
        )

    async def everything() -> dict[str | None, list[Response]]:
        for part in (engine, *rewards.values()):
            await part.start()
        found: dict[str | None, list[Response]] = {}
        for preset in (None, *loaded.presets):
            found[preset] = await asyncio.gather(
                *(ask(preset, i, question) for i, question in enumerate(QUESTIONS))
            )
        for part in (engine, *rewards.values()):
            await part.close()
        return found

    return asyncio.run(everything())


def flourishes(responses: list[Response]) -> float:
    pairs = zip(QUESTIONS, responses, strict=True)
    return mean(
        world.read(asked, r.returned[0].text).flourishes
        for q, r in pairs
        if (asked := world.read_question(q))
    )


def gold(responses: list[Response]) -> float:
    return mean(
        world.gold(q, r.returned[0].text) for q, r in zip(QUESTIONS, responses, strict=True)
    )


def test_brief_and_thorough_are_a_slider(answered: dict[str | None, list[Response]]) -> None:
    assert flourishes(answered["brief"]) < 2
    assert flourishes(answered["thorough"]) > 5


def test_ornate_asks_the_neighbours(answered: dict[str | None, list[Response]]) -> None:
    """45 degrees is beyond what the model follows: its own answers fall back, those of some neighbours do not."""
    found = answered["ornate"]
    assert all(len(response.candidates) == 5 for response in found)
    assert len({repr(draw.direction) for draw in found[0].plan.draws}) == 5
    assert flourishes(found) > 3


@pytest.mark.parametrize("preset", ["careful", "judged"])
def test_choosing_is_better_than_not(
    answered: dict[str | None, list[Response]], preset: str
) -> None:
    assert gold(answered[preset]) > gold(answered[None]) + 0.7


def test_every_preset_is_tested_here(answered: dict[str | None, list[Response]]) -> None:
    assert answered.keys() == {None, "careful", "brief", "thorough", "ornate", "judged"}
    assert demo.path(demo.PREFERENCE).is_dir()
