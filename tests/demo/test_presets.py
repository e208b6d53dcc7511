"""The demo's presets have the effect that their names promise."""

from __future__ import annotations

import asyncio
from statistics import mean
from typing import Any

import pytest

from infer_align import config, demo
from infer_align.demo import world
from infer_align.flow.plan import make_plan
from infer_align.flow.request import parse_request
from infer_align.flow.response import Response
from infer_align.flow.run import align

pytestmark = pytest.mark.slow

QUESTIONS = world.prompts(24, seed=909)


@pytest.fixture(scope="module")
def answered() -> dict[str | None, list[Response]]:
    """Preset -> the response to each question, with equal seeds; None is no preset."""
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
            make_plan(request, engine, rewards, default, loaded.limits, loaded.methods),
            engine,
        )

    async def everything() -> dict[str | None, list[Response]]:
        for part in (engine, *rewards.values()):
            await part.start()
        responses: dict[str | None, list[Response]] = {}
        for preset in (None, *loaded.presets):
            calls = [ask(preset, i, question) for i, question in enumerate(QUESTIONS)]
            responses[preset] = await asyncio.gather(*calls)
        for part in (engine, *rewards.values()):
            await part.close()
        return responses

    return asyncio.run(everything())


def flourishes(responses: list[Response]) -> float:
    counts = []
    for text, response in zip(QUESTIONS, responses, strict=True):
        question = world.read_question(text)
        assert question
        counts.append(world.read(question, response.returned[0].text).flourishes)
    return mean(counts)


def gold(responses: list[Response]) -> float:
    return mean(
        world.gold(q, r.returned[0].text) for q, r in zip(QUESTIONS, responses, strict=True)
    )


def test_brief_and_thorough_change_the_verbosity(
    answered: dict[str | None, list[Response]],
) -> None:
    assert flourishes(answered["brief"]) < 2
    assert flourishes(answered["thorough"]) > 5


def test_ornate_draws_from_neighbouring_directions(
    answered: dict[str | None, list[Response]],
) -> None:
    """The model cannot follow 45 degrees, but it follows some neighbours of this direction."""
    responses = answered["ornate"]
    assert all(len(response.candidates) == 5 for response in responses)
    assert len({repr(draw.direction) for draw in responses[0].plan.draws}) == 5
    assert flourishes(responses) > 3


@pytest.mark.parametrize("preset", ["careful", "judged"])
def test_a_selection_beats_a_single_draw(
    answered: dict[str | None, list[Response]], preset: str
) -> None:
    assert gold(answered[preset]) > gold(answered[None]) + 0.7


def test_every_preset_is_tested_here(answered: dict[str | None, list[Response]]) -> None:
    assert answered.keys() == {None, "careful", "brief", "thorough", "ornate", "judged"}
    assert demo.path(demo.PREFERENCE).is_dir()
