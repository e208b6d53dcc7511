"""Run the served flow of a configuration without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.demo.direction import direction_at, ratings
from infer_align import config
from infer_align.demo import world
from infer_align.engines import Engine
from infer_align.flow.plan import make_plan
from infer_align.flow.request import parse_request
from infer_align.flow.response import Response
from infer_align.flow.run import align
from infer_align.rewards import Reward
from infer_align.types import Array

MAX_TOKENS = 96
# Number of concurrent requests. With all of them at once, a judge would wait too long for the
# engine.
CONCURRENCY = 16


@dataclass(frozen=True, slots=True)
class Flow:
    """A started engine and started rewards."""

    config: config.Config
    engine: Engine
    rewards: Mapping[str, Reward]

    async def ask(
        self, question: str, seed: int, align_fields: Mapping[str, Any] | None = None, **body: Any
    ) -> Response:
        """Return the response to one question.

        Args:
            question: the user's message.
            seed: seed of the request.
            align_fields: the request's `align`.
            body: further fields of the request.
        """
        chat = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": MAX_TOKENS,
            "seed": seed,
            **body,
        }
        if align_fields is not None:
            chat["align"] = align_fields
        request = parse_request(chat, "chat", self.config.presets)
        plan = make_plan(
            request,
            self.engine,
            self.rewards,
            self.config.server.default_rewards,
            self.config.limits,
            self.config.methods,
        )
        return await align(plan, self.engine)

    async def ask_all(
        self,
        questions: Sequence[str],
        seed: int,
        align_fields: Mapping[str, Any] | None = None,
        **body: Any,
    ) -> list[Response]:
        """Send the same request for every question, each with its own seed.

        The seed of a question does not depend on the request, so that different requests can be
        compared in pairs.
        """
        slots = asyncio.Semaphore(CONCURRENCY)

        async def ask_in_turn(index: int, question: str) -> Response:
            async with slots:
                return await self.ask(question, seed * 1_000_003 + index, align_fields, **body)

        calls = [ask_in_turn(index, question) for index, question in enumerate(questions)]
        return await asyncio.gather(*calls)


@asynccontextmanager
async def serving(
    source: Path | None = None, settings: Sequence[str] = ("engine.threads=1",)
) -> AsyncIterator[Flow]:
    """Start a configuration as it is served, on one thread; by default the embedded demo.

    Args:
        source: the file of the configuration.
        settings: texts `a.b=c` that replace settings of the file.
    """
    torch.set_num_threads(1)
    loaded = config.load(source, [*settings, "limits.max_candidates=1024"])
    engine = loaded.load_engine()
    rewards = loaded.load_rewards({"served": engine})
    await engine.start()
    for reward in rewards.values():
        await reward.start()
    try:
        yield Flow(loaded, engine, rewards)
    finally:
        for reward in rewards.values():
            await reward.close()
        await engine.close()


def attributes(question: str, text: str) -> tuple[float, float]:
    """Return the exact (helpfulness, verbosity) of an answer."""
    parsed = world.read_question(question)
    assert parsed is not None
    return ratings(parsed, text)


def texts(responses: Sequence[Response]) -> list[list[str]]:
    """Return the texts of all candidates of each response."""
    return [[candidate.text for candidate in response.candidates] for response in responses]


def selected_texts(responses: Sequence[Response]) -> list[str]:
    """Return the text that each response returns."""
    return [response.returned[0].text for response in responses]


def gold(questions: Sequence[str], answers: Sequence[str]) -> Array:
    """Return the gold reward [P] of one answer per question."""
    return np.array([world.gold(*pair) for pair in zip(questions, answers, strict=True)])


def projected(questions: Sequence[str], answers: Sequence[str], degrees: float) -> Array:
    """Return the exact v . r [P] of one answer per question, with v at this angle."""
    rewards = np.array([attributes(*pair) for pair in zip(questions, answers, strict=True)])
    return np.asarray(rewards @ np.array([*direction_at(degrees).values()]))


def generated_tokens(responses: Sequence[Response]) -> Array:
    """Return the number of generated tokens [P] of each response."""
    totals: list[float] = []
    for response in responses:
        totals.append(float(sum(each.completion_tokens for each in response.candidates)))
    return np.array(totals)
