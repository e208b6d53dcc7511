"""Plans, rewards and engines that the tests of the flow share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from infer_align import align
from infer_align.config import Limits
from infer_align.engines.fake import Fake, FakeEngine, Reply
from infer_align.flow.plan import Plan, make_plan
from infer_align.flow.request import parse_request
from infer_align.flow.response import Response
from infer_align.flow.scorers import Scorer
from infer_align.objectives import Ensemble
from infer_align.rewards import Reward, RewardScores
from infer_align.types import Draw, ScoringUsage

BODY = {"messages": [{"role": "user", "content": "hello"}]}
REQUEST_BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 10}
LIMITS = Limits(max_candidates=16, max_completion_tokens=1000)


class Scripted(Reward):
    """A reward whose scores are a function of the candidates."""

    def __init__(
        self,
        score: Callable[[Any], Any],
        members: int = 1,
        attributes: tuple[str, ...] = (),
        timeout: float = 5.0,
    ) -> None:
        self.members = tuple(str(i) for i in range(members))
        self.attributes = attributes
        self.timeout_seconds = timeout
        self.calls = 0
        self._score = score

    async def score(self, messages: Any, candidates: Any) -> RewardScores:
        self.calls += 1
        scores = self._score(candidates)
        return await scores if asyncio.iscoroutine(scores) else scores


def by_number(candidates: Any) -> RewardScores:
    """Score each candidate by its text, read as a number."""
    values = np.array([[[float(c.text) for c in candidates]]])
    return RewardScores(values, usage=ScoringUsage(len(candidates)))


def ones(candidates: Any) -> RewardScores:
    """Score every candidate with 1."""
    return RewardScores(np.ones((1, 1, len(candidates))))


class Pipelined(Scripted):
    """Scores each candidate as soon as it is finished."""

    pipelined = True


async def forever(_: Any) -> RewardScores:
    """Score nothing until the caller cancels it."""
    await asyncio.Event().wait()
    raise AssertionError


def scorers(weights: dict[str, float], rewards: dict[str, Reward]) -> tuple[Scorer, ...]:
    """Return the scorers for {name or name.attribute: weight}."""
    made = []
    for name, weight in weights.items():
        reward_name, _, attribute = name.partition(".")
        made.append(Scorer(reward_name, rewards[reward_name], weight, attribute or None))
    return tuple(made)


def plan(n: int = 3, *, draws: int = 1, **fields: Any) -> Plan:
    """Return a plan of equal draws, n candidates each, seeded by their index."""
    made = tuple(Draw(BODY, n, tuple(range(d * n, (d + 1) * n))) for d in range(draws))
    return Plan(
        made,
        ensemble=Ensemble("mean"),
        messages=BODY["messages"],
        selects=n * draws > 1,
        **fields,
    )


def scored(n: int = 3, reward: Reward | None = None, **fields: Any) -> Plan:
    """Return a plan with one scorer, "r"; by default it reads the candidate's text as a number."""
    reward = Scripted(by_number) if reward is None else reward
    return plan(n, scorers=scorers({"r": 1.0}, {"r": reward}), **fields)


def engine(*replies: Reply | str) -> FakeEngine:
    """Return an engine that plays the replies, not yet started."""
    return Fake(replies=tuple(r if isinstance(r, Reply) else Reply(r) for r in replies)).load()


async def drained(source: FakeEngine) -> None:
    """Wait until the engine samples nothing."""
    async with asyncio.timeout(30):
        while source.running:
            await asyncio.sleep(0.001)


def run(made: Plan, source: FakeEngine, on_delta: Any = None) -> Response:
    """Carry out a plan, and wait until the engine samples nothing."""

    async def scenario() -> Response:
        await source.start()
        response = await align(made, source, on_delta)
        await drained(source)
        return response

    return asyncio.run(scenario())


class Quality(Reward):
    """A reward with two objectives."""

    attributes = ("helpful", "brief")

    async def score(self, messages: Any, candidates: Any) -> RewardScores:
        return RewardScores(np.zeros((2, 1, len(candidates))))


class One(Reward):
    """A reward with one objective."""

    async def score(self, messages: Any, candidates: Any) -> RewardScores:
        return RewardScores(np.zeros((1, 1, len(candidates))))


REWARDS = {"one": One(), "quality": Quality()}


def plan_request(align: Any = None, presets: Any = None, default: Any = None, **fields: Any) -> Any:
    """Plan REQUEST_BODY with these fields and this `align`."""
    body = {**REQUEST_BODY, **fields, **({} if align is None else {"align": align})}
    request = parse_request(body, "chat", presets or {})
    return make_plan(
        request, Fake().load(), REWARDS, {"one": 1.0} if default is None else default, LIMITS
    )


def weights(made: Plan) -> dict[str, float]:
    """Return {scorer name: weight} of a plan."""
    return {scorer.name: scorer.weight for scorer in made.scorers}
