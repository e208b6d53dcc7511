"""The served flow without HTTP, on the embedded demo: what a client would send goes in, the whole response comes out."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console

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

OUT = Console(width=max(130, Console().width))
MAX_TOKENS = 96
AT_ONCE = 16  # requests, as a server would let in: a judge that waits in line for all of them would be too late


@dataclass(frozen=True, slots=True)
class Flow:
    """A started engine and started rewards."""

    config: config.Config
    engine: Engine
    rewards: Mapping[str, Reward]

    async def ask(
        self, question: str, seed: int, wanted: Mapping[str, Any] | None = None, **body: Any
    ) -> Response:
        """The response to one question; `wanted` is the request's `align`."""
        chat = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": MAX_TOKENS,
            "seed": seed,
            **body,
        }
        if wanted is not None:
            chat["align"] = wanted
        request = parse_request(chat, "chat", self.config.presets)
        c = self.config
        plan = make_plan(
            request,
            self.engine,
            self.rewards,
            c.server.default_rewards,
            c.limits,
            c.methods,
        )
        return await align(plan, self.engine)

    async def ask_all(
        self,
        questions: Sequence[str],
        seed: int,
        wanted: Mapping[str, Any] | None = None,
        **body: Any,
    ) -> list[Response]:
        """The same request for every question, with a seed for each; the same seeds for whatever request."""
        turn = asyncio.Semaphore(AT_ONCE)

        async def one(index: int, question: str) -> Response:
            async with turn:
                return await self.ask(question, seed * 1_000_003 + index, wanted, **body)

        return await asyncio.gather(*(one(i, question) for i, question in enumerate(questions)))


@asynccontextmanager
async def serving() -> AsyncIterator[Flow]:
    """The embedded demo as it is served, on one thread."""
    torch.set_num_threads(1)
    loaded = config.load(None, ["engine.threads=1", "limits.max_candidates=1024"])
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
    """Exact (helpfulness, verbosity) of an answer."""
    asked = world.read_question(question)
    assert asked is not None
    return ratings(asked, text)


def texts(responses: Sequence[Response]) -> list[list[str]]:
    """Every candidate's text, as drawn."""
    return [[candidate.text for candidate in response.candidates] for response in responses]


def chosen(responses: Sequence[Response]) -> list[str]:
    """The answers that are returned."""
    return [response.returned[0].text for response in responses]


def gold(questions: Sequence[str], answers: Sequence[str]) -> Array:
    """Gold of each answer, [P]."""
    return np.array([world.gold(*pair) for pair in zip(questions, answers, strict=True)])


def projected(questions: Sequence[str], answers: Sequence[str], degrees: float) -> Array:
    """[P]: v . r of each answer, exactly, with v at `degrees`."""
    rewards = np.array([attributes(*pair) for pair in zip(questions, answers, strict=True)])
    return np.asarray(rewards @ np.array([*direction_at(degrees).values()]))


def tokens(responses: Sequence[Response]) -> float:
    """Generated for one answer, on average."""
    return float(
        np.mean([sum(c.completion_tokens for c in response.candidates) for response in responses])
    )


def mean_se(values: Array) -> tuple[float, float]:
    """Mean and standard error of [P] values."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def shown(value: float, error: float, *, sign: bool = False) -> str:
    """A figure, or a difference in bold where it is more than two standard errors from zero."""
    if not sign:
        return f"{value:.2f} ± {error:.2f}"
    return f"[{'bold' if abs(value) > 2 * error else 'dim'}]{value:+.2f} ± {error:.2f}[/]"
