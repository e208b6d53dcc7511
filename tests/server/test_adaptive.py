"""Adaptive drawing over HTTP: what is drawn, what is charged, and how the report explains it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import infer_align

# In the first batch the scores are spread; candidate 5 is far above all others.
TEXTS = ("3", "1", "4", "2", "3", "90", "2", "4", "1", "3", "2", "4")
REPLIES = ", ".join(f'{{text = "candidate {text}"}}' for text in TEXTS)
CONFIG = f"""
[engine]
kind = "fake"
replies = [{REPLIES}]
[rewards.number]
kind = "callable"
function = "tests.server.scorers:number"
[rewards.constant]
kind = "callable"
function = "tests.server.scorers:constant"
[rewards.fails]
kind = "callable"
function = "tests.server.scorers:fails"
[rewards.trust_judge]
kind = "trust_judge"
[rewards.hanging]
kind = "callable"
function = "tests.server.scorers:hanging"
timeout_seconds = 3600
[server]
default_rewards = {{ number = 1.0 }}
[limits]
candidate_tokens_per_minute = 100_000
"""
ADAPTIVE: dict[str, Any] = {"adaptive": {"max_n": 12, "batch": 4, "cost": 0.1}}


@pytest.fixture
def live(serve: Any) -> Any:
    return serve(CONFIG)


def test_the_drawing_ends_at_a_candidate_far_above_the_others(live: Any) -> None:
    answer = live.chat(ADAPTIVE, max_tokens=5)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    align = body["align"]
    assert align["methods"] == ["adaptive"]
    assert len(align["candidates"]) == 8
    assert align["selected"] == 5
    assert body["choices"][0]["message"]["content"] == "candidate 90"
    assert "drew 8 of at most 12: the expected gain of 4 more is 0.0" in align["reason"]
    assert align["reason"].endswith("standard deviations, under the cost of 0.1")
    assert not align["partial"]
    assert body["usage"]["completion_tokens"] == 16
    assert align["usage"]["candidate_tokens"] == 16
    assert align["usage"]["saved_tokens"] == 4 * 2
    assert align["usage"]["engine_calls"] == 8
    timing = align["timing"]
    assert timing["generate_seconds"] > 0
    assert timing["score_seconds"] > 0
    assert live.idle()


def test_the_worst_case_is_charged_and_what_was_not_drawn_is_given_back(live: Any) -> None:
    tokens = live.service.tokens
    before = tokens.available("127.0.0.1")
    live.chat(ADAPTIVE, max_tokens=5)
    # The budget refills while the test runs.
    assert before - 16 <= tokens.available("127.0.0.1")
    refused = live.chat({**ADAPTIVE, "budget": {"completion_tokens": 59}}, max_tokens=5)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "over_budget"
    assert "12 candidates x 5 tokens" in refused.json()["error"]["message"]


def test_a_cost_of_zero_draws_everything(live: Any) -> None:
    align = live.chat({"adaptive": {"max_n": 10, "batch": 4, "cost": 0}}).json()["align"]
    assert len(align["candidates"]) == 10
    assert align["reason"].endswith("; drew all 10 candidates")


def test_equal_scores_end_the_drawing(live: Any) -> None:
    align = live.chat({**ADAPTIVE, "rewards": {"constant": 1}}).json()["align"]
    assert len(align["candidates"]) == 4


def test_several_answers_are_returned_best_first(live: Any) -> None:
    body = live.chat(ADAPTIVE, n=7).json()
    contents = [choice["message"]["content"] for choice in body["choices"]]
    assert contents[:2] == ["candidate 90", "candidate 4"]
    assert len(contents) == 7
    assert len(body["align"]["candidates"]) == 7


def test_best_of_n_is_the_first_batch(live: Any) -> None:
    align = live.chat({**ADAPTIVE, "best_of_n": {"n": 6}}).json()["align"]
    assert len(align["candidates"]) == 6 + 4
    assert align["methods"] == ["adaptive", "best_of_n"]


def test_each_prompt_has_its_own_number_of_draws(live: Any) -> None:
    body = {"model": live.service.model, "prompt": ["a", "b"], "align": ADAPTIVE, "max_tokens": 5}
    reports = live.post(body, "/v1/completions").json()["align"]["prompts"]
    assert [len(report["candidates"]) for report in reports] == [8, 8]


def test_a_stream_ends_with_the_chosen_answer(live: Any) -> None:
    text = live.chat(ADAPTIVE, stream=True).text
    assert '"content":"candidate 90"' in text.replace(" candidate", "candidate")
    assert "drew 8 of at most 12" in text
    assert text.rstrip().endswith("data: [DONE]")


def test_a_client_that_leaves_ends_the_drawing(live: Any, hold: Any) -> None:
    before = live.metric("infer_align_disconnects_total")
    align = {**ADAPTIVE, "rewards": {"hanging": 1}}
    sampled = live.engine.sampled
    with (
        live.http() as client,
        client.stream(
            "POST",
            "/v1/chat/completions",
            json={
                "model": live.service.model,
                "messages": [{"role": "user", "content": "x"}],
                "align": align,
                "stream": True,
            },
            headers={"x-stainless-read-timeout": "1"},
        ),
    ):
        assert live.until(lambda: live.engine.sampled == sampled + 4)
    assert live.until(lambda: live.metric("infer_align_disconnects_total") == before + 1)
    hold.set()
    assert live.idle()
    assert live.engine.sampled == sampled + 4


def test_if_nothing_can_be_scored_one_batch_is_drawn(live: Any) -> None:
    sampled = live.engine.sampled
    answer = live.chat({**ADAPTIVE, "rewards": {"fails": 1}})
    assert answer.status_code == 424
    assert live.engine.sampled == sampled + 4


def test_comparisons_of_the_growing_pool_are_counted(live: Any) -> None:
    judged = {"rewards": {"number": 0}, "trust_judge": {"mode": "pairwise"}, "details": "scores"}
    align = {**judged, "adaptive": {"max_n": 6, "batch": 3, "cost": 0}}
    answer = live.chat(align, max_tokens=5)
    assert answer.status_code == 200, answer.text
    report = answer.json()["align"]
    # Both orders of each pair: 3 pairs after the first batch, and all 15 after the second.
    assert report["usage"]["judge_calls"] == 2 * (3 + 15)
    assert len(report["reports"]["trust_judge"]["comparisons"]) == 15
    over = live.chat({**align, "budget": {"completion_tokens": 6 * 5 + 35}}, max_tokens=5)
    assert over.json()["error"]["code"] == "over_budget"
    assert "+ 36 of judging" in over.json()["error"]["message"]


@pytest.mark.parametrize(
    ("align", "param"),
    [
        ({"adaptive": {"max_n": 0}}, "align.adaptive.max_n"),
        ({"adaptive": {"max_n": 1_000_000}}, "align.adaptive.max_n"),
        ({"adaptive": {"cost": "cheap"}}, "align.adaptive.cost"),
        ({"adaptive": {"n": 4}}, "align.adaptive.n"),
        ({**ADAPTIVE, "best_of_n": {"n": 13}}, "align.adaptive.max_n"),
        ({**ADAPTIVE, "rewards": {}}, "align.rewards"),
    ],
)
def test_bad_requests_are_refused_by_name(live: Any, align: Any, param: str) -> None:
    answer = live.chat(align)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.slow
def test_on_the_demo_it_draws_the_beginning_of_best_of_n(serve: Any) -> None:
    demo = Path(infer_align.__file__).parent / "demo" / "infer-align.toml"
    live = serve(demo.read_text(encoding="utf-8"))
    fields = {"max_tokens": 64, "seed": 3}
    shared = {"rewards": {"quality": 1, "gold": 0}, "details": "candidates"}
    adaptive = live.chat({**shared, "adaptive": {"max_n": 24, "cost": 0.2}}, **fields).json()
    fixed = live.chat({**shared, "best_of_n": {"n": 24}}, **fields).json()
    drawn = adaptive["align"]["candidates"]
    assert 4 <= len(drawn) < 24
    for candidate, fixed_candidate in zip(drawn, fixed["align"]["candidates"], strict=False):
        assert candidate["choice"] == fixed_candidate["choice"]
        assert candidate["scores"]["quality"]["value"] == pytest.approx(
            fixed_candidate["scores"]["quality"]["value"], abs=1e-4
        )


@pytest.mark.slow
def test_directions_share_every_batch(serve: Any) -> None:
    demo = Path(infer_align.__file__).parent / "demo" / "infer-align.toml"
    live = serve(demo.read_text(encoding="utf-8"))
    align = {
        "dpa": {"direction": {"helpfulness": 1.0, "verbosity": 0.0}},
        "rps": {"k": 3},
        "adaptive": {"max_n": 12, "batch": 6, "cost": 0},
    }
    report = live.chat(align, max_tokens=64, seed=3).json()["align"]
    directions = [str(candidate["direction"]) for candidate in report["candidates"]]
    assert len(directions) == 12
    assert {directions[:6].count(d) for d in directions} == {2}
    assert {directions.count(d) for d in directions} == {4}
