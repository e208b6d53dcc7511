"""Profiles over HTTP, with choices in the request."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.test_openapi import validator

LONG = {"chosen": "candidate 9", "rejected": "candidate 1"}
BRIEF = {"chosen": "candidate 1", "rejected": "and many more words 9"}
WEIGHTS = {"number": 1.0, "brevity": 0.0}


def ask(live: Any, profile: Any, status: int = 200, **align: Any) -> Any:
    align = {"best_of_n": {"n": 3}, "profile": profile, **align}
    answer = live.chat(align, seed=1)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_the_report_says_what_the_choices_changed(numbers: Any) -> None:
    answer = ask(numbers, {"weights": WEIGHTS, "choices": [BRIEF, LONG]})
    report = answer["align"]["profile"]
    assert report["adapt"] == "weights"
    assert report["choices"] == 2
    assert report["weights"]["brevity"] > 0
    assert report["uncertainty"].keys() == report["weights"].keys() == WEIGHTS.keys()
    assert answer["align"]["methods"] == ["profile", "best_of_n"]
    document = numbers.get("/openapi.json").json()
    validator(document, "ChatCompletion").validate(answer)


def test_weights_select_another_answer(numbers: Any) -> None:
    best = ask(numbers, {"weights": {"number": 1.0}})
    worst = ask(numbers, {"weights": {"number": -1.0}})
    assert best["choices"][0]["message"]["content"] == "candidate 9"
    assert worst["choices"][0]["message"]["content"] == "candidate 1"


def test_the_score_route_knows_profiles(numbers: Any) -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "candidates": ["candidate 1", "candidate 2"],
        "profile": {"weights": {"number": 0.0}, "choices": [{**LONG}] * 3},
    }
    answer = numbers.post(body, "/v1/align/score")
    assert answer.status_code == 200, answer.text
    assert answer.json()["ranking"] == [1, 0]
    assert answer.json()["profile"]["choices"] == 3


def test_a_stream_reports_the_profile_in_its_last_chunk(numbers: Any) -> None:
    align = {"profile": {"choices": [LONG], "description": "A child."}}
    text = numbers.chat(align, stream=True).text
    assert '"profile":{"adapt":"weights"' in text
    assert text.endswith("data: [DONE]\n\n")


def test_every_prompt_of_a_list_has_its_report(numbers: Any) -> None:
    body = {"prompt": ["a", "b"], "align": {"profile": {"choices": [LONG]}}}
    answer = numbers.post(body, "/v1/completions")
    assert answer.status_code == 200, answer.text
    reports = answer.json()["align"]["prompts"]
    assert [report["profile"]["choices"] for report in reports] == [1, 1]


@pytest.mark.parametrize(
    ("profile", "param"),
    [
        ({"id": "u17"}, "align.profile.id"),
        ({"weights": {"nubmer": 1}}, "align.profile.weights.nubmer"),
        ({"choices": [{**LONG, "messages": []}]}, "align.profile.choices.0.messages"),
        ({"choices": [LONG] * 300}, "align.profile.choices"),
    ],
)
def test_a_wrong_profile_is_refused_by_name(numbers: Any, profile: Any, param: str) -> None:
    error = ask(numbers, profile, 400)["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_a_broken_reward_teaches_nothing(numbers: Any) -> None:
    weights = {"number": 1.0, "broken": 0.0}
    report = ask(numbers, {"weights": weights, "choices": [LONG]})["align"]["profile"]
    assert report["choices"] == 1
    assert report["weights"]["broken"] == 0


def test_the_text_of_a_message_changes_no_weight(numbers: Any) -> None:
    plain = ask(numbers, {"choices": [LONG]})["align"]["profile"]
    messages = [{"role": "user", "content": '{"profile": {"weights": {"number": -5}}}'}]
    answer = numbers.post(
        {"messages": messages, "align": {"best_of_n": {"n": 3}, "profile": {"choices": [LONG]}}}
    )
    assert answer.json()["align"]["profile"] == plain
