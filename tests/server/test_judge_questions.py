"""What a judge reads, over HTTP: principles, rubrics, aspects, votes, and panels of judges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

USER: Any = [{"role": "user", "content": "hello there"}]
CONFIG = r"""
[engine]
kind = "fake"
replies = [{text = "Mice."}, {text = "Gladly! Mice."}]
labels = [
  {pattern = 'Criteria: brief\..*Answer <\d+>\nMice', probabilities = {"90" = 1.0}},
  {pattern = 'Criteria: brief\..*Answer <\d+>\nGladly', probabilities = {"20" = 1.0}},
  {pattern = 'Criteria: polite\..*Answer <\d+>\nMice', probabilities = {"30" = 1.0}},
  {pattern = 'Criteria: polite\..*Answer <\d+>\nGladly', probabilities = {"80" = 1.0}},
  {pattern = 'Criteria: brief\..*Answer A <\d+>\nMice', probabilities = {A = 0.8, B = 0.2}},
  {pattern = 'Criteria: polite\..*Answer A <\d+>\nGladly', probabilities = {A = 0.9, B = 0.1}},
  {pattern = 'Criteria: (brief|polite)\..*Answer A', probabilities = {B = 0.9, A = 0.1}},
]
[engines.other]
kind = "fake"
model = "the-other"
labels = [{probabilities = {"50" = 1.0, A = 1.0}}]
[dpa]
attributes = ["tone", "length"]
[rewards.trust_judge]
kind = "trust_judge"
[rewards.jury]
kind = "trust_judge"
panel = ["served", "other"]
criteria = "brief"
[rewards.sides]
kind = "trust_judge"
aspects = {tone = "polite", length = "brief"}
[presets.polite]
trust_judge = {criteria = "polite"}
[limits]
max_completion_tokens = 4000
"""
BEST: Any = {"best_of_n": {"n": 2}, "rewards": {}}


@pytest.fixture(scope="module")
def live(serve: Callable[[str], Any]) -> Any:
    return serve(CONFIG)


def chat(live: Any, align: Any) -> Any:
    answer = live.chat(align, max_tokens=8)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return body["choices"][0]["message"]["content"], body["align"]


def judged(live: Any, **fields: Any) -> Any:
    body = {"messages": USER, "candidates": ["Mice.", "Gladly! Mice."], **fields}
    answer = live.post(body, "/v1/align/judge")
    assert answer.status_code == 200, answer.text
    return answer.json()


def on_five(score: float) -> Any:
    return pytest.approx(1 + (score - 1) * 4 / 99)


@pytest.mark.parametrize("mode", ["score", "pairwise"])
def test_changing_a_principle_changes_the_answer(live: Any, mode: str) -> None:
    for principle, answer in (
        ({"text": "brief"}, "Mice."),
        ({"text": "polite"}, "Gladly! Mice."),
        ({"text": "polite", "negate": True}, "Mice."),
    ):
        text, align = chat(live, {**BEST, "trust_judge": {"principles": [principle], "mode": mode}})
        assert text == answer, principle
        assert align["usage"]["judge_calls"] == 2


def test_the_report_holds_every_reading(live: Any) -> None:
    principles = [{"text": "brief"}, {"text": "polite", "weight": 2}]
    _, align = chat(live, {**BEST, "trust_judge": {"principles": principles}})
    brief, polite = align["reports"]["trust_judge"]["principles"]
    assert brief["scores"] == {"0": on_five(90), "1": on_five(20)}
    assert polite["weight"] == 2.0
    assert align["usage"]["judge_calls"] == 4 == align["usage"]["judge_completion_tokens"]


def test_the_chances_of_principles_go_to_select(live: Any) -> None:
    judge = {"principles": [{"text": "brief"}, {"text": "polite"}], "mode": "pairwise"}
    text, align = chat(live, {**BEST, "trust_judge": judge, "select": {"rule": "win_rate"}})
    assert text == "Gladly! Mice.", "0.9 for the second one, 0.85 for the first"
    assert align["selection"]["condorcet"] == 1


def test_aspects_share_the_weight(live: Any) -> None:
    judge = {"aspects": {"tone": "polite", "length": "brief"}, "weight": 2.0}
    _, align = chat(live, {**BEST, "trust_judge": judge})
    first = align["candidates"][0]
    assert first["scores"]["trust_judge.tone"]["value"] == on_five(30)
    assert first["scores"]["trust_judge.length"]["value"] == on_five(90)
    mean = sum(score["value"] for score in first["scores"].values()) / 2
    assert first["objective"] == pytest.approx(2 * mean)


def test_a_request_weighs_aspects_itself(live: Any) -> None:
    judge = {"aspects": {"tone": "polite", "length": "brief"}}
    for name, answer in (("tone", "Gladly! Mice."), ("length", "Mice.")):
        body = {**BEST, "rewards": {f"trust_judge.{name}": 1.0}, "trust_judge": judge}
        text, align = chat(live, body)
        assert text == answer
        assert list(align["candidates"][0]["scores"]) == [f"trust_judge.{name}"]
        configured, _ = chat(live, {**BEST, "rewards": {f"sides.{name}": 1.0}})
        assert configured == answer


def test_aspects_are_scored_along_a_direction(live: Any) -> None:
    judge = {"aspects": {"tone": "polite", "length": "brief"}}
    for direction, answer in (
        ({"tone": 1.0}, "Gladly! Mice."),
        ({"tone": 0.1, "length": 1.0}, "Mice."),
    ):
        body = {**BEST, "dpa": {"direction": direction}, "trust_judge": judge}
        text, align = chat(live, body)
        assert text == answer
        assert list(align["candidates"][0]["scores"]) == ["trust_judge"]


def test_aspects_can_be_shaped_and_gated(live: Any) -> None:
    compose = {
        "trust_judge.tone": {"shape": "rank"},
        "gates": {"trust_judge.length": {"at_least": 3}},
    }
    judge = {"aspects": {"tone": "polite", "length": "brief"}}
    text, align = chat(live, {**BEST, "trust_judge": judge, "compose": compose})
    assert text == "Mice.", "the polite one misses the gate"
    assert align["candidates"][1]["scores"]["trust_judge.tone"]["composed"] == 1.0


def test_a_judge_with_aspects_scores_only_if_it_is_named(live: Any) -> None:
    before = len(live.engine.queries)
    answer = live.chat({"best_of_n": {"n": 2}, "dpa": {"direction": {"tone": 1.0}}}, max_tokens=8)
    assert answer.status_code in {200, 400}
    assert len(live.engine.queries) == before


def test_scoring_by_principles(live: Any) -> None:
    body = {
        "messages": USER,
        "candidates": ["Mice.", "Gladly! Mice."],
        "rewards": {},
        "trust_judge": {"rubric": "polite [Hard Rule]\nbrief"},
    }
    answer = live.post(body, "/v1/align/score").json()
    assert answer["usage"]["judge_calls"] == 4
    assert answer["reports"]["trust_judge"]["principles"][0]["hard"]


def test_the_members_of_a_panel_are_its_judges(live: Any) -> None:
    _, align = chat(live, {**BEST, "rewards": {"jury": 1.0}, "ensemble": {"objective": "wco"}})
    assert align["candidates"][0]["scores"]["jury"]["members"] == [on_five(90), on_five(50)]
    assert align["candidates"][0]["objective"] == on_five(50)
    judges = align["reports"]["jury"]["judges"]
    assert judges["other"]["agreement"] == 0.0, "it gives both the same"
    assert judges["other"]["lean"] == pytest.approx(-5 * 4 / 99)


def test_votes_cost_what_is_admitted(live: Any) -> None:
    _, align = chat(live, {**BEST, "trust_judge": {"criteria": "brief", "votes": 3}})
    # Three critiques per answer, and a label after each.
    assert align["usage"]["judge_calls"] == 2 * 3 * 2
    over = live.chat({**BEST, "trust_judge": {"criteria": "brief", "votes": 64}}, max_tokens=8)
    assert over.status_code == 400
    assert f"{2 * 64 * (256 + 1)} of judging" in over.json()["error"]["message"]


def test_an_answer_in_place_of_a_rubric_is_refused_once_and_the_reason_says_so(live: Any) -> None:
    judge = {"rubric": "auto", "scale": 5}
    calls = []
    for _ in range(2):
        _, align = chat(live, {**BEST, "trust_judge": judge})
        calls.append(align["usage"]["judge_calls"])
        rubric = align["reports"]["trust_judge"]["rubric"]
        assert not rubric["accepted"]
        assert "0 of 1 lines are rules" in rubric["reason"]
        assert "the generated rubric is not used" in align["reason"]
        assert "the criteria decide" in align["reason"]
    assert calls == [1 + 2, 2]
    assert live.metric("infer_align_reward_remarks_total", reward="trust_judge") == 2


# --- /v1/align/judge ---


def test_judging_by_principles(live: Any) -> None:
    principles = [{"text": "brief"}, {"text": "polite", "weight": 3}]
    response = judged(live, principles=principles)
    assert [c["score"] for c in response["candidates"]] == pytest.approx([45, 65])
    brief, polite = response["principles"]
    assert brief["scores"] == {"0": on_five(90), "1": on_five(20)}
    orders = brief["comparisons"][0]["orders"]
    assert orders == [
        pytest.approx({"A": 0.8, "B": 0.2}),
        pytest.approx({"B": 0.9, "A": 0.1}),
    ]
    assert polite["comparisons"][0]["relation"] == "smaller"
    [pair] = response["pairs"]
    assert pair["relation"] == "smaller"
    assert pair["win_probability"] == pytest.approx((0.85 + 3 * 0.1) / 4)
    assert pair["orders"] == []
    assert response["judges"] == {}
    assert response["rubric"] is None
    assert response["usage"]["judge_calls"] == 4 + 4


def test_judging_by_aspects(live: Any) -> None:
    response = judged(live, aspects={"tone": "polite", "length": "brief"}, mode="score")
    assert [c["score"] for c in response["candidates"]] == pytest.approx([60, 50])
    assert [principle["name"] for principle in response["principles"]] == ["tone", "length"]


def test_judging_with_a_panel(live: Any) -> None:
    response = judged(live, judge="jury")
    assert [c["score"] for c in response["candidates"]] == pytest.approx([70, 35])
    assert response["judges"]["other"] == {
        "lean": pytest.approx(-5 * 4 / 99),
        "position_bias": pytest.approx(1.0),
        "agreement": {"score": 0.0, "pairwise": 0.0},
        "principles": [],
    }
    assert response["judges"]["served"]["position_bias"] == pytest.approx((0.6 - 0.8) / 2)


def test_the_response_gives_the_position_bias(live: Any) -> None:
    response = judged(live, criteria="brief", mode="pairwise")
    assert response["position_bias"] == pytest.approx((0.6 - 0.8) / 2)
    assert judged(live, criteria="brief", mode="score")["position_bias"] is None


def test_a_request_replaces_the_questions_of_its_preset(live: Any) -> None:
    preset = judged(live, model="fake@polite", mode="score")
    assert preset["candidates"][1]["score"] == pytest.approx(80)
    other = judged(live, model="fake@polite", principles=[{"text": "brief"}], mode="score")
    assert other["candidates"][1]["score"] == pytest.approx(20)


@pytest.mark.parametrize(
    ("parameters", "param", "hint"),
    [
        ({"principles": []}, ".principles", "at least 1"),
        ({"principles": ["brief"]}, ".principles.0", "object"),
        ({"principles": [{"text": " "}]}, ".principles.0.text", "words"),
        ({"principles": [{"text": "x", "weight": -1}]}, ".principles.0.weight", "greater"),
        ({"principles": [{"text": "x", "negated": True}]}, ".principles.0.negated", "negate"),
        ({"principles": [{"weight": 1}]}, ".principles.0.text", "required"),
        ({"principles": [{"text": "x", "weight": 0}]}, "", "weight over 0"),
        ({"principles": [{"text": "x"}], "criteria": "y"}, "", "not both"),
        ({"principles": [{"text": "x"}], "aspects": ["y"]}, "", "not both"),
        ({"aspects": {"a.b": "x"}}, ".aspects", "match pattern"),
        ({"aspects": ["x", "x"]}, "", "own name"),
        ({"rubric": ""}, ".rubric", "words"),
        ({"votes": 0}, ".votes", "greater than or equal to 1"),
        ({"votes": 65}, ".votes", "less than or equal to 64"),
        ({"votes": "3"}, ".votes", "integer"),
    ],
)
def test_wrong_questions(live: Any, parameters: Any, param: str, hint: str) -> None:
    answer = live.chat({"trust_judge": parameters})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"].startswith(f"align.trust_judge{param}")
    assert hint in error["message"], error
    answer = live.post({"messages": USER, "candidates": ["x"], **parameters}, "/v1/align/judge")
    assert answer.status_code == 400, answer.text
    assert hint in answer.json()["error"]["message"]
