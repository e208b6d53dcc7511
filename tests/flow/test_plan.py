"""From a request body to a plan: the draws, the scorers, the worst case, and every refusal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.config import Limits
from infer_align.config.align import Budget, parse_align
from infer_align.engines.fake import Fake
from infer_align.errors import AlignError, InvalidRequest
from infer_align.flow.plan import Plan, make_plan, make_scoring_plan
from infer_align.flow.request import parse_request
from infer_align.flow.scorers import reward_names
from infer_align.flow.seeds import SEED_RANGE
from infer_align.objectives import Ensemble
from infer_align.rewards import Reward, RewardScores

BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 10}
LIMITS = Limits(max_candidates=16, max_completion_tokens=1000)


class Quality(Reward):
    """Two objectives."""

    attributes = ("helpful", "brief")

    async def score(self, messages: Any, candidates: Any) -> RewardScores:
        return RewardScores(np.zeros((2, 1, len(candidates))))


class One(Reward):
    """One."""

    async def score(self, messages: Any, candidates: Any) -> RewardScores:
        return RewardScores(np.zeros((1, 1, len(candidates))))


REWARDS = {"one": One(), "quality": Quality()}


def plan(align: Any = None, presets: Any = None, default: Any = None, **fields: Any) -> Any:
    body = {**BODY, **fields, **({} if align is None else {"align": align})}
    request = parse_request(body, "chat", presets or {})
    return make_plan(
        request, Fake().load(), REWARDS, {"one": 1.0} if default is None else default, LIMITS
    )


def weights(made: Plan) -> dict[str, float]:
    return {scorer.name: scorer.weight for scorer in made.scorers}


def test_a_plain_request_is_one_draw_of_the_whole_body() -> None:
    made = plan(temperature=0.5, custom={"a": 1}, user=None)
    assert len(made.draws) == 1
    assert made.draws[0].body == {**BODY, "temperature": 0.5, "custom": {"a": 1}}, (
        "null is absent, the rest is kept"
    )
    assert (made.selects, made.scorers, made.methods) == (False, (), ())
    assert (made.n_returned, made.candidates) == (1, 1)
    assert made.worst_case_tokens == 10


def test_the_clients_body_is_not_edited() -> None:
    body = {**BODY, "n": 2, "seed": 1, "stream": True, "align": {"best_of_n": {"n": 4}}}
    before = repr(body)
    request = parse_request(body, "chat", {})
    make_plan(request, Fake().load(), REWARDS, {"one": 1.0}, LIMITS)
    assert repr(body) == before


def test_best_of_n() -> None:
    made = plan({"best_of_n": {"n": 4}}, n=2)
    assert (made.candidates, made.n_returned, made.selects, made.worst_case_tokens) == (
        4,
        2,
        True,
        40,
    )
    assert weights(made) == {"one": 1.0}
    assert made.methods == ("best_of_n",)
    assert made.ensemble == Ensemble()
    assert "n" not in made.draws[0].body


def test_n_alone_compares_nothing_and_with_rewards_it_ranks() -> None:
    assert plan(n=3).selects is False
    assert plan({"rewards": {"one": 1}}, n=3).selects is True
    assert plan({"rewards": {"one": 1}}).selects is False, "one draw streams as it is sampled"


def test_align_given_empty_is_still_aligned() -> None:
    assert parse_request({**BODY, "align": {}}, "chat", {}).aligned
    assert not parse_request({**BODY, "align": None}, "chat", {}).aligned
    assert parse_request(BODY, "chat", {"p": {}}, "p").aligned


def test_settings() -> None:
    request = parse_align(
        {
            "rewards": {"a": 1},
            "ensemble": {"objective": "wco"},
            "budget": {"deadline_seconds": 2},
            "details": "none",
        },
        {},
    )
    assert request.rewards == {"a": 1.0}
    assert request.ensemble == Ensemble("wco")
    assert request.budget == Budget(deadline_seconds=2.0)
    assert request.details == "none"


def test_presets_are_overridden_key_by_key() -> None:
    presets = {"p": {"best_of_n": {"n": 4}, "details": "none"}, "q": {"best_of_n": {"n": 2}}}
    assert plan({"preset": "p"}, presets).candidates == 4
    assert plan({"preset": "p", "best_of_n": {}}, presets).candidates == 8, (
        "a key is replaced whole"
    )
    assert plan({"preset": "p", "best_of_n": None}, presets).candidates == 1, (
        "null takes a key away"
    )
    assert parse_align({"preset": "q"}, presets, preset="p").methods["best_of_n"].n == 2  # type: ignore[attr-defined]


def test_reward_names() -> None:
    assert reward_names(REWARDS) == ["one", "quality.helpful", "quality.brief"]
    made = plan({"best_of_n": {}, "rewards": {"quality.brief": 2}})
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
            plan({"best_of_n": {}, "rewards": {name: 1}})
        assert caught.value.param == f"align.rewards.{name}"


def test_nothing_to_choose_by() -> None:
    for align, default in (
        ({"best_of_n": {}}, {}),
        ({"best_of_n": {}, "rewards": {"one": 0}}, None),
    ):
        with pytest.raises(InvalidRequest, match="nothing to choose by"):
            plan(align, default=default)


@pytest.mark.parametrize(
    ("align", "fields", "code"),
    [
        ({"best_of_n": {"n": 17}}, {}, "too_many_candidates"),
        ({"best_of_n": {"n": 10**18}}, {}, "too_many_candidates"),
        ({"best_of_n": {"n": 16}}, {"max_tokens": 63}, "over_limit"),
        ({"best_of_n": {"n": 2}, "budget": {"completion_tokens": 19}}, {}, "over_budget"),
        ({}, {"n": 17}, "invalid_value"),
        ({"best_of_n": {"n": 2}}, {"n": 3}, "invalid_value"),
        ({}, {"max_tokens": "abc"}, "invalid_value"),
        ({}, {"max_tokens": None, "max_completion_tokens": 10**9}, "over_limit"),
    ],
)
def test_limits(align: Any, fields: Any, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan(align, **fields)
    assert caught.value.code == code


def test_the_limits_are_inclusive() -> None:
    assert plan({"best_of_n": {"n": 16}}, max_tokens=62).worst_case_tokens == 992
    assert (
        plan({"best_of_n": {"n": 2}, "budget": {"completion_tokens": 20}}).worst_case_tokens == 20
    )


@given(st.integers(-(2**63), 2**63 - 1), st.integers(1, 16))
def test_seeds_are_in_range_distinct_and_the_first_is_the_plain_requests(seed: int, n: int) -> None:
    seeds = plan({"best_of_n": {"n": n}}, seed=seed).draws[0].seeds
    assert len(set(seeds)) == n
    assert all(0 <= s < SEED_RANGE for s in seeds)
    assert seeds[0] == plan(seed=seed).draws[0].seeds[0]


JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = ["preset", "best_of_n", "rewards", "ensemble", "budget", "details", "dpa", "vas", "x"]


@given(
    st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4) | JSON,
    st.dictionaries(st.sampled_from(["n", "seed", "messages", "max_tokens"]), JSON),
)
def test_any_json_gives_a_plan_or_a_named_refusal(align: Any, fields: Any) -> None:
    refusal = made = None
    try:
        made = plan(align, **fields)
    except AlignError as error:
        refusal = error
    assert made is None or (1 <= made.candidates <= 16 and made.worst_case_tokens <= 1000)
    assert refusal is None or (refusal.status == 400 and refusal.param)


# --- scoring of existing candidates ---


def scoring_plan(align: Any, n: int = 2) -> Plan:
    parsed = parse_align(align, path="")
    return make_scoring_plan(BODY["messages"], n, parsed, Fake().load(), REWARDS, {"one": 1.0})


def test_a_scoring_plan_scores_and_draws_nothing() -> None:
    made = scoring_plan({"rewards": {"one": 2.0}})
    assert weights(made) == {"one": 2.0}
    assert (made.candidates, made.selects, made.scoring_tokens) == (2, True, 0)
    assert weights(scoring_plan({})) == {"one": 1.0}


@pytest.mark.parametrize(
    ("align", "param"),
    [
        ({"rewards": {"on": 1.0}}, "rewards.on"),
        ({"rewards": {"one": -1.0}}, "rewards.one"),
        ({"rewards": {"one": 0.0}}, "rewards"),
        ({"dpa": {"direction": {"helpfull": 1.0}}}, "dpa.direction.helpfull"),
        ({"ensemble": {"objective": "median"}}, "ensemble.objective"),
        ({"trust_judge": {}}, "trust_judge"),
    ],
)
def test_its_errors_name_the_fields_of_the_body_itself(align: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        scoring_plan(align)
    assert caught.value.param == param
    assert caught.value.message.startswith(f"{param}: ")


# --- a reward is looked up once ---


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
    body = {**BODY, "align": {"best_of_n": {"n": 2}, "trust_judge": {"scale": 5}}}
    made = make_plan(parse_request(body, "chat", {}), Fake().load(), rewards, {"one": 1.0}, LIMITS)
    assert weights(made) == {"one": 1.0, "trust_judge": 1.0}
    assert judge.adapted == 1
