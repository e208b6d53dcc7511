"""The limits of the server and the budget of a request are checked before any cost."""

from __future__ import annotations

from typing import Any

import pytest

from infer_align.config.align import Align, Budget
from infer_align.errors import InvalidRequest
from infer_align.flow.limits import Generation, check_candidates, check_tokens
from infer_align.methods.best_of_n import BestOfN
from infer_align.methods.rps import RPS
from tests.flow.builders import LIMITS, plan_request


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
        plan_request(align, **fields)
    assert caught.value.code == code


def test_the_limits_are_inclusive() -> None:
    assert plan_request({"best_of_n": {"n": 16}}, max_tokens=62).worst_case_tokens == 992
    assert (
        plan_request({"best_of_n": {"n": 2}, "budget": {"completion_tokens": 20}}).worst_case_tokens
        == 20
    )


@pytest.mark.parametrize(
    ("path", "methods", "param"),
    [
        ("", {"best_of_n": BestOfN(17)}, "best_of_n.n"),
        ("align", {"best_of_n": BestOfN(17)}, "align.best_of_n.n"),
        ("", {"rps": RPS(17)}, "rps.k"),
        ("align", {"rps": RPS(17)}, "align.rps.k"),
        ("", {}, "n"),
        ("align", {}, "n"),
    ],
)
def test_too_many_candidates_are_refused_by_the_parameter_that_sets_their_number(
    path: str, methods: Any, param: str
) -> None:
    align = Align(methods=methods, path=path)
    check_candidates(16, 1, align, LIMITS)
    with pytest.raises(InvalidRequest, match=r"17 candidates .* limit of 16") as caught:
        check_candidates(17, 1, align, LIMITS)
    assert (caught.value.param, caught.value.code) == (param, "too_many_candidates")
    assert caught.value.message.startswith(f"{param}: ")


def test_no_more_answers_than_candidates_are_returned() -> None:
    check_candidates(2, 2, Align(), LIMITS)
    with pytest.raises(InvalidRequest, match=r"3 answers .* 2 candidates") as caught:
        check_candidates(2, 3, Align(), LIMITS)
    assert caught.value.param == "n"


@pytest.mark.parametrize(
    ("path", "param"),
    [("", "budget.completion_tokens"), ("align", "align.budget.completion_tokens")],
)
def test_a_worst_case_over_the_budget_names_the_budget(path: str, param: str) -> None:
    align = Align(budget=Budget(completion_tokens=25), path=path)
    check_tokens(Generation(20, judging=5), 2, align, LIMITS)
    terms = r"\(2 candidates x 10 tokens \+ 6 of judging\)"
    with pytest.raises(InvalidRequest, match=terms) as caught:
        check_tokens(Generation(20, judging=6), 2, align, LIMITS)
    assert (caught.value.param, caught.value.code) == (param, "over_budget")
    assert caught.value.message.startswith(f"{param}: ")


@pytest.mark.parametrize("path", ["", "align"])
def test_a_worst_case_over_the_servers_limit_names_the_field_of_openai(path: str) -> None:
    align = Align(path=path)
    check_tokens(Generation(1000), 2, align, LIMITS)
    with pytest.raises(InvalidRequest, match=r"\(2 candidates x 501 tokens\)") as caught:
        check_tokens(Generation(1002), 2, align, LIMITS)
    assert (caught.value.param, caught.value.code) == ("max_completion_tokens", "over_limit")
    with pytest.raises(InvalidRequest, match="set a lower max_tokens or draw") as caught:
        check_tokens(Generation(1002), 2, align, LIMITS, "max_tokens")
    assert caught.value.param == "max_tokens"
