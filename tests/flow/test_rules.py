"""The selection rule of a plan whose methods name no other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from infer_align.config import Limits
from infer_align.engines.fake import Fake
from infer_align.errors import InvalidRequest
from infer_align.flow.plan import make_plan
from infer_align.flow.request import parse_request
from infer_align.flow.rules import Highest
from infer_align.methods import Contest
from infer_align.rewards.rules import Rules


def test_the_highest_objective_is_first_and_equal_ones_stay_in_order() -> None:
    contest = Contest(np.array([1.0, -2.0, 3.0, 1.0]), measure="uwo", drawn=5)
    ranking = Highest().rank(contest)
    assert ranking.order == (2, 0, 3, 1)
    assert ranking.clause == "highest uwo of 5 candidates (3; runner-up 1)"


REWARDS: Any = {
    "quality": Rules(words_weight=-1.0).load(),
    "brief": Rules(words_weight=-1.0).load(),
}


def checked(align: Any, weights: dict[str, float]) -> None:
    """Plan a request with these weights."""
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    full = {"best_of_n": {"n": 3}, "rewards": weights, **align}
    request = parse_request({**body, "align": full}, "chat", {})
    make_plan(request, Fake().load(), REWARDS, {}, Limits())


@pytest.mark.parametrize(
    ("align", "param", "message"),
    [
        ({"compose": {"qualty": {}}}, "align.compose.qualty", "did you mean 'quality'"),
        (
            {"compose": {"gates": {"bref": {"at_least": 0}}}},
            "align.compose.gates.bref",
            "did you mean 'brief'",
        ),
        ({"compose": {"brief": {}}}, "align.compose.brief", "give it a weight in align.rewards"),
        ({"select": {"rule": "minimax"}}, "align.select.rule", "quality alone"),
        ({"select": {"rule": "maxmin", "order": ["brief"]}}, "align.select.order", "'brief'"),
    ],
)
def test_what_a_plan_lacks_is_refused_by_name(align: Any, param: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        checked(align, {"quality": 1.0})
    assert caught.value.param == param


def test_a_reward_of_weight_0_may_be_a_gate_but_no_group() -> None:
    weights = {"quality": 1.0, "brief": 0.0}
    checked({"compose": {"gates": {"brief": {"at_least": 0}}}}, weights)
    with pytest.raises(InvalidRequest, match="quality alone"):
        checked({"select": {"rule": "win_rate"}}, weights)


def test_consensus_is_planned_without_a_reward() -> None:
    checked({"select": {"rule": "consensus"}}, {})
    with pytest.raises(InvalidRequest, match="nothing to choose by"):
        checked({"select": {"rule": "shortest"}}, {})
