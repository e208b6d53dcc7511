"""Equal requests with equal seeds have equal responses, alone and beside other requests."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest

SEEDED = """
[engine]
kind = "fake"
replies = [
    {text = "about {prompt} {seed}"},
    {text = "or {seed}"},
    {text = "{seed} 4", seconds_per_token = 0.01},
]
[rewards.length]
kind = "callable"
function = "tests.server.scorers:shortest"
"""
TIMELESS = {"id", "created"}


def contents(answer: Any) -> Any:
    body = answer.json()
    if "align" in body:
        del body["align"]["timing"]
    return {key: value for key, value in body.items() if key not in TIMELESS}


@pytest.mark.parametrize("align", [None, {"best_of_n": {"n": 6}, "details": "candidates"}])
def test_same_seed_same_answer_alone_and_in_a_crowd(serve: Any, align: Any) -> None:
    live = serve(SEEDED)
    alone = contents(live.chat(align, seed=11))
    answers: list[Any] = []
    threads = [
        threading.Thread(target=lambda i=i: answers.append((i, contents(live.chat(align, seed=i)))))
        for i in range(32)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dict(answers)[11] == alone
    assert len({str(answer["choices"]) for _, answer in answers}) == 32, (
        "another seed, another answer"
    )


def test_candidates_get_seeds_of_their_own(serve: Any) -> None:
    align = (
        serve(SEEDED)
        .chat({"best_of_n": {"n": 6}, "details": "candidates"}, seed=100)
        .json()["align"]
    )
    texts = [c["choice"]["message"]["content"] for c in align["candidates"]]
    seeds = [int(re.search(r"\d{3,}", text).group()) for text in texts]
    assert seeds[0] == 100, "the first is what the request gives without a selection"
    assert len(set(seeds)) == 6
    neighbour = (
        serve(SEEDED)
        .chat({"best_of_n": {"n": 6}, "details": "candidates"}, seed=101)
        .json()["align"]
    )
    assert not set(texts) & {c["choice"]["message"]["content"] for c in neighbour["candidates"]}, (
        "neighbouring seeds share nothing"
    )


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_any_seed_is_taken(serve: Any, seed: int) -> None:
    live = serve(SEEDED)
    answers = [live.chat({"best_of_n": {"n": 3}}, seed=seed) for _ in range(2)]
    assert answers[0].status_code == 200, answers[0].text
    assert contents(answers[0]) == contents(answers[1])


def test_no_seed_is_a_new_one_each_time(serve: Any) -> None:
    live = serve(SEEDED)
    assert contents(live.chat())["choices"] != contents(live.chat())["choices"]


@pytest.mark.parametrize("stream", [False, True])
def test_best_of_one_is_the_model_alone(serve: Any, stream: bool) -> None:
    live = serve(SEEDED)
    if stream:
        texts = [
            live.chat(align, seed=5, stream=True).text for align in (None, {"best_of_n": {"n": 1}})
        ]
        assert all("about" in text and " 5" in text for text in texts)
        return
    plain, best = (contents(live.chat(align, seed=5)) for align in (None, {"best_of_n": {"n": 1}}))
    assert best["choices"] == plain["choices"]
    assert best["usage"] == plain["usage"]


def test_ties_go_to_the_lowest_index(numbers: Any) -> None:
    align = numbers.chat({"best_of_n": {"n": 5}, "rewards": {"constant": 1}}).json()["align"]
    assert align["selected"] == 0
    answer = numbers.chat({"best_of_n": {"n": 5}, "rewards": {"constant": 1}}, n=5).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == ["candidate 3", "candidate 1", "candidate 9", "candidate 9", "candidate 5"]


def test_details(numbers: Any) -> None:
    body = {"best_of_n": {"n": 2}}
    assert "align" not in numbers.chat({**body, "details": "none"}).json()
    for details, keys in (("scores", set()), ("candidates", {"choice"})):
        candidate = numbers.chat({**body, "details": details}).json()["align"]["candidates"][0]
        common = {
            "index",
            "objective",
            "scores",
            "direction",
            "finish_reason",
            "completion_tokens",
            "error",
        }
        assert set(candidate) == common | keys
    assert '"align"' not in numbers.chat({**body, "details": "none"}, stream=True).text


def test_the_whole_report(numbers: Any) -> None:
    align = numbers.chat({"best_of_n": {"n": 3}}).json()["align"]
    timing = align.pop("timing")
    assert set(timing) == {"generate_seconds", "score_seconds", "total_seconds"}
    assert all(seconds >= 0 for seconds in timing.values())
    assert [c["scores"]["number"] for c in align.pop("candidates")] == [
        {"value": v, "std": 0.0, "members": [v]} for v in (3.0, 1.0, 9.0)
    ]
    assert align == {
        "methods": ["best_of_n"],
        "selected": 2,
        "dropped": 0,
        "partial": False,
        "reason": "highest uwo of 3 candidates (9; runner-up 3)",
        "usage": {
            "engine_calls": 3,
            "candidate_tokens": 6,
            "saved_tokens": 0,
            "reward_tokens": 0,
            "judge_calls": 0,
            "judge_prompt_tokens": 0,
            "judge_completion_tokens": 0,
        },
    }


def test_usage_counts_the_prompt_once_and_everything_generated(numbers: Any) -> None:
    usage = numbers.chat({"best_of_n": {"n": 5}}, n=2).json()["usage"]
    assert usage == {
        "prompt_tokens": 2,
        "completion_tokens": 10,
        "total_tokens": 12,
        "completion_tokens_details": {
            "accepted_prediction_tokens": 4,
            "rejected_prediction_tokens": 6,
        },
    }


def test_a_reward_of_weight_0_is_shown_and_does_not_choose(numbers: Any) -> None:
    align = numbers.chat({"best_of_n": {"n": 5}, "rewards": {"number": 0, "constant": 1}}).json()[
        "align"
    ]
    assert align["selected"] == 0
    assert [c["objective"] for c in align["candidates"]] == [1.0] * 5
    assert [c["scores"]["number"]["value"] for c in align["candidates"]] == [3, 1, 9, 9, 5]


def test_rewards_are_weighted(numbers: Any) -> None:
    align = numbers.chat({"best_of_n": {"n": 5}, "rewards": {"number": 0.5, "constant": 3}}).json()[
        "align"
    ]
    assert [c["objective"] for c in align["candidates"]] == [4.5, 3.5, 7.5, 7.5, 5.5]


def test_a_preset_is_overridden_key_by_key(numbers: Any) -> None:
    def candidates(align: Any, model: str) -> list[Any]:
        report: dict[str, Any] = numbers.chat(align, model=model).json()["align"]
        return [c["objective"] for c in report["candidates"]]

    assert candidates(None, "fake@three") == [3, 1, 9]
    assert candidates({"preset": "three"}, "fake") == [3, 1, 9]
    assert candidates({"preset": "three"}, "fake@best") == [3, 1, 9], "align wins over the name"
    assert candidates({"best_of_n": {"n": 2}}, "fake@three") == [3, 1]
    assert candidates({"rewards": {"constant": 2}}, "fake@three") == [2, 2, 2]


def test_align_is_never_read_from_text(numbers: Any) -> None:
    text = '{"align": {"best_of_n": {"n": 5}}} <align>best_of_n</align> fake@best'
    before = numbers.engine.sampled
    answer = numbers.chat(messages=[{"role": "user", "content": text}])
    assert "align" not in answer.json()
    assert numbers.engine.sampled == before + 1


def test_one_draw_can_be_scored_too(numbers: Any) -> None:
    align = numbers.chat({"rewards": {"number": 1}}).json()["align"]
    assert align["candidates"][0]["objective"] == 3
    assert align["methods"] == []


def test_score_ranks_as_best_of_n_does(numbers: Any) -> None:
    drawn = numbers.chat({"best_of_n": {"n": 5}, "details": "candidates"}).json()["align"]
    texts = [c["choice"]["message"]["content"] for c in drawn["candidates"]]
    body = {"messages": [{"role": "user", "content": "hello there"}], "candidates": texts}
    scored = numbers.post(body, "/v1/align/score").json()
    assert scored["ranking"] == [2, 3, 4, 0, 1]
    assert scored["ranking"][0] == drawn["selected"]
    assert [c["scores"] for c in scored["candidates"]] == [c["scores"] for c in drawn["candidates"]]
    chosen = numbers.post(
        {**body, "model": "fake@three", "candidates": ["9", "7"]}, "/v1/align/score"
    ).json()
    assert chosen["ranking"] == [0, 1]
    assert numbers.post({**body, "rewards": {"broken": 1}}, "/v1/align/score").status_code == 424
    partly = numbers.post({**body, "rewards": {"picky": 1}}, "/v1/align/score").json()
    assert partly["ranking"] == [2, 3, 4, 1]
    assert partly["candidates"][0]["error"].startswith("not scored")
