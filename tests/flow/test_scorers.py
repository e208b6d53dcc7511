"""The rewards that a request names become the scorers of its plan."""

from __future__ import annotations

from typing import Any

import pytest

from infer_align.engines.fake import Fake
from infer_align.errors import InvalidRequest, Unsupported
from infer_align.flow.plan import make_plan
from infer_align.flow.request import parse_request
from infer_align.flow.scorers import Scorer, resolve_scorers, reward_names
from infer_align.methods import PlanDraft, ScorerRequest
from infer_align.rewards import Reward
from infer_align.types import Draw
from tests.flow.builders import LIMITS, REQUEST_BODY, REWARDS, One, plan_request, weights


def test_reward_names() -> None:
    assert reward_names(REWARDS) == ["one", "quality.helpful", "quality.brief"]
    made = plan_request({"best_of_n": {}, "rewards": {"quality.brief": 2}})
    assert weights(made) == {"quality.brief": 2.0}
    (scorer,) = made.scorers
    assert scorer.reward is REWARDS["quality"]
    assert scorer.attribute == "brief"
    for name, hint in (
        ("quality", "several objectives"),
        ("quality.breif", "did you mean 'quality.brief'"),
        ("one.x", "did you mean 'one'"),
    ):
        with pytest.raises(InvalidRequest, match=hint) as caught:
            plan_request({"best_of_n": {}, "rewards": {name: 1}})
        assert caught.value.param == f"align.rewards.{name}"


def test_nothing_to_choose_by() -> None:
    for rewards in ({}, {"one": 0}, {"one": {"weight": 0}}):
        with pytest.raises(InvalidRequest, match="nothing to choose by"):
            plan_request({"best_of_n": {}, "rewards": rewards})


class Counting(One):
    """Counts how often a request adapts it."""

    def __init__(self) -> None:
        self.adapted = 0

    def with_parameters(self, parameters: Any) -> Reward:
        self.adapted += 1
        return self


def test_a_judge_is_made_once_per_request() -> None:
    judge = Counting()
    rewards: dict[str, Reward] = {**REWARDS, "trust_judge": judge}
    body = {**REQUEST_BODY, "align": {"best_of_n": {"n": 2}, "trust_judge": {"scale": 5}}}
    made = make_plan(parse_request(body, "chat", {}), Fake().load(), rewards, {"one": 1.0}, LIMITS)
    assert weights(made) == {"one": 1.0, "trust_judge": 1.0}
    assert judge.adapted == 1


# --- rewards that a method adds ---


def resolve(request: ScorerRequest, rewards: dict[str, Reward]) -> tuple[Scorer, ...]:
    draft = PlanDraft((Draw(REQUEST_BODY, 2),), scorers=(request,), selects=True)
    return resolve_scorers(draft, {}, rewards, {})


@pytest.mark.parametrize("name", ["one", "quality.brief"])
def test_a_method_may_add_a_reward_without_parameters(name: str) -> None:
    (scorer,) = resolve(ScorerRequest(name, 2.0), REWARDS)
    assert (scorer.name, scorer.weight) == (name, 2.0)
    assert scorer.reward is REWARDS[scorer.reward_name]


@pytest.mark.parametrize("name", ["one", "quality.brief"])
def test_parameters_of_a_reward_that_takes_none_are_refused(name: str) -> None:
    with pytest.raises(Unsupported, match=r"scale: .* takes no parameters of a request"):
        resolve(ScorerRequest(name, 1.0, {"scale": 5}), REWARDS)


def test_a_reward_that_is_not_configured_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"align\.other: this server has no reward 'other'"):
        resolve(ScorerRequest("other", 1.0), REWARDS)
