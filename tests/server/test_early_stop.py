"""Early stopping over HTTP: which candidates stop, why, and how many tokens that saves."""

from __future__ import annotations

from typing import Any

import pytest

WORDS = "w " * 39
REPLIES = ", ".join(
    f'{{text = "{i} {WORDS}{i}", seconds_per_token = 0.004, '
    f"estimates = {{helpful = {value}, brief = {-value}}}}}"
    for i, value in enumerate((0.1, 0.9, 0.3, 0.7))
)
CONFIG = f"""
[engine]
kind = "fake"
replies = [{REPLIES}]
[rewards.number]
kind = "callable"
function = "tests.server.scorers:number"
[limits]
candidate_tokens_per_minute = 100_000
"""
BEST: dict[str, Any] = {"best_of_n": {"n": 4}, "rewards": {"number": 1}}


@pytest.fixture
def live(serve: Any) -> Any:
    return serve(CONFIG)


def test_candidates_with_low_estimates_stop_and_the_report_has_the_saved_tokens(live: Any) -> None:
    answer = live.chat(
        {**BEST, "early_stop": {"values": {"helpful": 1.0}, "after": 4}}, max_tokens=60
    )
    assert answer.status_code == 200, answer.text
    body = answer.json()
    align = answer.json()["align"]
    candidates = align["candidates"]
    assert align["methods"] == ["best_of_n", "early_stop"]
    assert align["selected"] == 1, (
        "3 has the higher reward; at 8 tokens it was stopped for a lower estimate"
    )
    assert [c["completion_tokens"] == 41 for c in candidates] == [False, True, False, False]
    assert all(4 <= candidates[i]["completion_tokens"] < 20 for i in (0, 2, 3))
    assert (
        candidates[0]["error"]
        == "stopped early: after 4 tokens, estimate 0.1, below the best 2 of 4"
    )
    assert (
        candidates[3]["error"]
        == "stopped early: after 8 tokens, estimate 0.7, below the best 1 of 2"
    )
    assert align["dropped"] == 3
    assert "3 of them stopped early" in align["reason"]
    assert not align["partial"], "a stopped candidate does not make the response partial"
    assert candidates[0]["scores"]["number"]["value"] is None, "a stopped candidate is not scored"
    spent = sum(c["completion_tokens"] for c in candidates)
    assert body["usage"]["completion_tokens"] == spent
    assert align["usage"]["saved_tokens"] == 4 * 41 - spent
    assert live.idle()


def test_several_values_are_weighted(live: Any) -> None:
    align = live.chat(
        {**BEST, "early_stop": {"values": {"helpful": 1.0, "brief": 3.0}, "after": 4}}
    ).json()["align"]
    assert align["selected"] == 0


def test_the_requested_number_of_candidates_is_completed(live: Any) -> None:
    body = live.chat({**BEST, "early_stop": {"values": {"helpful": 1.0}, "after": 4}}, n=3).json()
    assert [choice["message"]["content"][0] for choice in body["choices"]] == ["3", "2", "1"]
    assert body["align"]["dropped"] == 1


def test_the_token_budget_is_charged_for_sampled_tokens(live: Any) -> None:
    tokens = live.service.tokens
    before = tokens.available("127.0.0.1")
    spent = live.chat({**BEST, "early_stop": {"values": {"helpful": 1.0}, "after": 4}}).json()[
        "usage"
    ]["completion_tokens"]
    assert before - tokens.available("127.0.0.1") <= spent, "the bucket fills up meanwhile"


@pytest.mark.parametrize(
    ("align", "param", "hint"),
    [
        (
            {"early_stop": {"values": {"helpful": 1.0}}},
            "align.early_stop",
            "give align.best_of_n or align.rps too",
        ),
        (
            {**BEST, "early_stop": {"values": {"helpfull": 1.0}}},
            "align.early_stop.values.helpfull",
            "did you mean 'helpful'",
        ),
        ({**BEST, "early_stop": {"values": {}}}, "align.early_stop.values", ""),
        (
            {**BEST, "early_stop": {"values": {"helpful": 1.0}, "keep": 2}},
            "align.early_stop.keep",
            "2",
        ),
    ],
)
def test_bad_input_is_named(live: Any, align: Any, param: str, hint: str) -> None:
    answer = live.chat(align)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert hint in answer.json()["error"]["message"]
