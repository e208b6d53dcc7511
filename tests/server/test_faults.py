"""Failed candidates and rewards are data in the response; a request fails if nothing remains."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import FOREVER

pytestmark = pytest.mark.slow

GOOD = '{text = "candidate 4"}'
BAD = '{text = "", error = "out of memory", status = 503}'
HANGING = '[rewards.hanging]\nkind = "callable"\nfunction = "tests.server.scorers:hanging"\n'
NUMBER = '[rewards.number]\nkind = "callable"\nfunction = "tests.server.scorers:number"\n'
# A fifth of it is kept for scoring: longer than a busy machine holds a server up.
SCORED_IN_TIME = {"deadline_seconds": 5.0}


def script(*replies: str, rewards: str = NUMBER) -> str:
    return f'[engine]\nkind = "fake"\nreplies = [{", ".join(replies)}]\n{rewards}'


# --- candidates ---


@pytest.mark.parametrize(
    "replies", [(BAD, GOOD, GOOD, GOOD), (GOOD, BAD, BAD, GOOD), (BAD, BAD, BAD, GOOD)]
)
def test_failed_candidates_are_dropped(serve: Any, replies: tuple[str, ...]) -> None:
    live = serve(script(*replies))
    dropped = live.metric("infer_align_candidates_total", outcome="dropped")
    answer = live.chat({"best_of_n": {"n": 4}})
    assert answer.status_code == 200, answer.text
    align = answer.json()["align"]
    failed = [i for i, reply in enumerate(replies) if reply == BAD]
    assert align["selected"] == replies.index(GOOD)
    assert align["dropped"] == len(failed)
    for i in failed:
        candidate = align["candidates"][i]
        assert "out of memory" in candidate["error"]
        assert candidate["objective"] is None, "a failure is never a 0"
        assert candidate["scores"]["number"]["value"] is None
        assert candidate["scores"]["number"]["members"] == [None]
    assert live.metric("infer_align_candidates_total", outcome="dropped") == dropped + len(failed)
    assert live.idle()


@pytest.mark.parametrize("align", [{"best_of_n": {"n": 4}}, None])
@pytest.mark.parametrize("stream", [False, True])
def test_all_candidates_fail_with_the_status_of_the_first(
    serve: Any, align: Any, stream: bool
) -> None:
    live = serve(script(BAD, '{text = "", error = "another"}'))
    answer = live.chat(align, stream=stream)
    assert answer.status_code == 503
    assert "out of memory" in answer.json()["error"]["message"]
    assert live.engine.sampled <= 40
    assert live.idle()


def test_without_a_selection_one_failed_candidate_fails_the_request(serve: Any) -> None:
    answer = serve(script(GOOD, BAD)).chat(n=2)
    assert answer.status_code == 503, "fewer choices than n would be a silent failure"
    assert "candidate 1 failed: out of memory" in answer.json()["error"]["message"]


def test_a_failed_candidate_is_not_returned_even_with_weight_0(serve: Any) -> None:
    answer = serve(script(BAD, GOOD)).chat({"rewards": {"number": 0}}, n=2)
    assert answer.status_code == 200, answer.text
    assert [c["message"]["content"] for c in answer.json()["choices"]] == ["candidate 4"]
    assert answer.json()["align"]["dropped"] == 1


def test_failed_candidates_are_not_retried(serve: Any) -> None:
    live = serve(script(BAD, BAD, BAD))
    before = live.engine.sampled
    live.chat({"best_of_n": {"n": 6}})
    assert live.engine.sampled == before + 6, "no retries behind the client's back"


# --- rewards ---


@pytest.mark.parametrize(
    ("reward", "why"), [("broken", "the reward model is on fire"), ("silent", "NaN")]
)
def test_a_request_without_any_score_fails(numbers: Any, reward: str, why: str) -> None:
    for stream in (False, True):
        answer = numbers.chat({"best_of_n": {"n": 3}, "rewards": {reward: 1}}, stream=stream)
        assert answer.status_code == 424
        error = answer.json()["error"]
        assert error["code"] == "reward_failed"
        assert why in error["message"]
    assert numbers.idle()


def test_a_reward_that_fails_on_one_candidate_drops_it(numbers: Any) -> None:
    align = numbers.chat({"best_of_n": {"n": 5}, "rewards": {"picky": 1}}).json()["align"]
    assert align["dropped"] == 1
    assert align["candidates"][0]["error"] == "not scored: picky: RuntimeError: three is too much"
    assert align["candidates"][0]["objective"] is None
    assert align["selected"] == 2


@pytest.mark.parametrize("weight", [0, 1])
def test_a_broken_reward_beside_a_good_one(numbers: Any, weight: float) -> None:
    answer = numbers.chat({"best_of_n": {"n": 5}, "rewards": {"number": 1, "broken": weight}})
    if weight:
        assert answer.status_code == 424, "a weighted sum without one of its terms compares nothing"
        return
    body = answer.json()
    assert body["align"]["selected"] == 2
    broken = body["align"]["candidates"][2]["scores"]["broken"]
    assert broken == {
        "value": None,
        "std": None,
        "members": [None],
        "note": "RuntimeError: the reward model is on fire",
    }


def test_the_reason_for_a_drop_names_the_reward_that_counts(numbers: Any) -> None:
    align = numbers.chat({"best_of_n": {"n": 5}, "rewards": {"silent": 0, "picky": 1}}).json()[
        "align"
    ]
    assert align["candidates"][0]["error"].startswith("not scored: picky:")


def test_an_infinite_score_is_no_score(numbers: Any) -> None:
    align = numbers.chat({"best_of_n": {"n": 3}, "rewards": {"infinite": 1}}).json()["align"]
    assert align["candidates"][1]["scores"]["infinite"]["value"] is None
    assert align["dropped"] == 1
    assert align["selected"] == 0


@pytest.mark.parametrize(
    "align", [{"rewards": {"broken": 1}}, {"best_of_n": {"n": 1}, "rewards": {"broken": 1}}]
)
@pytest.mark.parametrize("stream", [False, True])
def test_one_draw_needs_no_score(numbers: Any, align: Any, stream: bool) -> None:
    answer = numbers.chat(align, stream=stream)
    assert answer.status_code == 200, answer.text
    assert "candidate" in answer.text
    assert "nothing to compare" in answer.text
    assert '"error":{' not in answer.text


@pytest.mark.usefixtures("hold")
def test_a_reward_over_its_time_is_not_scored(serve: Any) -> None:
    live = serve(
        script(
            GOOD,
            rewards=f"{HANGING}timeout_seconds = 0.2\n",
        )
    )
    answer = live.chat({"best_of_n": {"n": 2}})
    assert answer.status_code == 424
    assert "no score within 0.2 s" in answer.json()["error"]["message"]
    assert live.idle()


@pytest.mark.usefixtures("hold")
def test_a_deadline_during_scoring_returns_the_candidates(serve: Any) -> None:
    live = serve(
        script(
            GOOD,
            rewards=HANGING,
        )
    )
    for stream in (False, True):
        before = live.metric("infer_align_candidates_total", outcome="kept")
        answer = live.chat(
            {"best_of_n": {"n": 2}, "budget": {"deadline_seconds": 1.0}}, stream=stream, n=2
        )
        assert answer.status_code == 200, answer.text
        assert '"partial":true' in answer.text
        assert "the deadline passed before scoring" in answer.text
        assert "data: [DONE]" in answer.text or not stream
        assert live.metric("infer_align_candidates_total", outcome="kept") == before + 2
    assert live.idle()


@pytest.mark.parametrize("select", [{}, {"select": {"rule": "shortest", "within": 99}}])
@pytest.mark.parametrize("stream", [False, True])
def test_at_a_deadline_an_answer_without_a_word_does_not_win(
    serve: Any, select: Any, stream: bool
) -> None:
    brief = '[rewards.brief]\nkind = "rules"\nwords_weight = -1.0\n'
    silent = f'{{text = "one", first_token_seconds = {FOREVER}}}'
    live = serve(
        script('{text = "three words here"}', silent, '{text = "two words"}', rewards=brief)
    )
    align = {"best_of_n": {"n": 3}, "budget": SCORED_IN_TIME, **select}
    answer = live.chat(align, stream=stream, n=3)
    assert answer.status_code == 200, answer.text
    if stream:
        assert '"content":"two words"' in answer.text
        return
    body = answer.json()
    texts = [choice["message"]["content"] for choice in body["choices"]]
    assert texts == ["two words", "three words here"]
    assert body["align"]["partial"]
    assert body["align"]["dropped"] == 1
    cut = body["align"]["candidates"][1]
    assert cut["error"] == "cut by the deadline before its first word"
    assert cut["scores"]["brief"]["value"] is None


@pytest.mark.usefixtures("hold")
@pytest.mark.parametrize("weight", [0, 1])
def test_at_a_deadline_the_rewards_that_have_scored_choose(serve: Any, weight: float) -> None:
    replies = [f'{{text = "candidate {number}"}}' for number in (2, 9, 4)]
    live = serve(script(*replies, rewards=HANGING + NUMBER))
    align = {
        "best_of_n": {"n": 3},
        "rewards": {"number": 1, "hanging": weight},
        "compose": {"number": {"shape": "rank"}},
        "budget": SCORED_IN_TIME,
    }
    report = live.chat(align).json()["align"]
    assert report["selected"] == 1
    assert report["partial"]
    assert report["dropped"] == 0
    assert report["reason"].startswith("highest composed uwo of 3 candidates (1; runner-up 0.5)")
    assert ("before hanging scored" in report["reason"]) == bool(weight)
    for candidate in report["candidates"]:
        assert candidate["scores"]["hanging"]["value"] is None
        assert "no score within" in candidate["scores"]["hanging"]["note"]
    assert live.idle()


# --- deadlines ---

# It takes minutes. A deadline leaves a part of it.
SLOW = f'{{text = "one two {"three " * 4000}eight 9", seconds_per_token = 0.02}}'
LATE = f'{{text = "one two 3", first_token_seconds = {FOREVER}}}'


@pytest.mark.parametrize("align", [{}, {"best_of_n": {"n": 2}, "rewards": {"brevity": 1}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_returns_a_partial_answer(serve: Any, align: Any, stream: bool) -> None:
    live = serve(script(SLOW, rewards='[rewards.brevity]\nkind = "rules"\nwords_weight = -1.0\n'))
    answer = live.chat({**align, "budget": {"deadline_seconds": 1.0}}, stream=stream)
    assert answer.status_code == 200, answer.text
    assert '"partial":true' in answer.text
    assert '"finish_reason":"length"' in answer.text
    assert "eight" not in answer.text
    assert live.idle()


def test_a_deadline_keeps_the_complete_candidates(serve: Any) -> None:
    live = serve(script(LATE, '{text = "candidate 2"}', '{text = "candidate 4"}'))
    answer = live.chat({"best_of_n": {"n": 3}, "budget": SCORED_IN_TIME})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "candidate 4"
    assert answer.json()["align"]["partial"] is True
    assert answer.json()["align"]["dropped"] == 1, "the empty one cannot be scored"
    assert answer.json()["align"]["usage"]["saved_tokens"] == 2, (
        "as long as the others, had it not been stopped"
    )
    assert live.idle()


@pytest.mark.parametrize("align", [{}, {"best_of_n": {"n": 2}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_before_any_token_is_504(serve: Any, align: Any, stream: bool) -> None:
    live = serve(script(LATE))
    answer = live.chat({**align, "budget": {"deadline_seconds": 0.2}}, stream=stream)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert live.idle()
