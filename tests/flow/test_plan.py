"""From a request to a plan: the draws, the worst case, and every refusal."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.config.align import parse_align
from infer_align.engines.fake import Fake
from infer_align.errors import AlignError, InvalidRequest
from infer_align.flow.plan import Plan, make_plan, make_scoring_plan
from infer_align.flow.request import parse_request
from infer_align.objectives import Ensemble
from tests.flow.builders import BODY, LIMITS, REQUEST_BODY, REWARDS, plan_request, weights


def test_a_plain_request_is_one_draw_of_the_whole_body() -> None:
    made = plan_request(temperature=0.5, custom={"a": 1}, user=None)
    assert len(made.draws) == 1
    assert made.draws[0].body == {**REQUEST_BODY, "temperature": 0.5, "custom": {"a": 1}}, (
        "null is absent, the rest is kept"
    )
    assert (made.selects, made.scorers, made.methods) == (False, (), ())
    assert (made.n_returned, made.candidates) == (1, 1)
    assert made.worst_case_tokens == 10


def test_the_clients_body_is_not_edited() -> None:
    body = {**REQUEST_BODY, "n": 2, "seed": 1, "stream": True, "align": {"best_of_n": {"n": 4}}}
    before = repr(body)
    request = parse_request(body, "chat", {})
    make_plan(request, Fake().load(), REWARDS, {"one": 1.0}, LIMITS)
    assert repr(body) == before


def test_best_of_n() -> None:
    made = plan_request({"best_of_n": {"n": 4}}, n=2)
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
    assert plan_request(n=3).selects is False
    assert plan_request({"rewards": {"one": 1}}, n=3).selects is True
    assert plan_request({"rewards": {"one": 1}}).selects is False, (
        "one draw streams as it is sampled"
    )


def test_presets_are_overridden_key_by_key() -> None:
    presets = {"p": {"best_of_n": {"n": 4}, "details": "none"}}
    assert plan_request({"preset": "p"}, presets).candidates == 4
    assert plan_request({"preset": "p", "best_of_n": {}}, presets).candidates == 8, (
        "a key is replaced whole"
    )
    assert plan_request({"preset": "p", "best_of_n": None}, presets).candidates == 1, (
        "null takes a key away"
    )


JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = ["preset", "best_of_n", "rewards", "ensemble", "budget", "details", "dpa", "vas", "x"]


@pytest.mark.slow
@given(
    st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4) | JSON,
    st.dictionaries(st.sampled_from(["n", "seed", "messages", "max_tokens"]), JSON),
)
def test_any_json_gives_a_plan_or_a_named_refusal(align: Any, fields: Any) -> None:
    refusal = made = None
    try:
        made = plan_request(align, **fields)
    except AlignError as error:
        refusal = error
    assert made is None or (1 <= made.candidates <= 16 and made.worst_case_tokens <= 1000)
    assert refusal is None or (refusal.status == 400 and refusal.param)


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
