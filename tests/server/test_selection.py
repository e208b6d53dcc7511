"""`compose` and `select` over HTTP on the embedded demo, with its real rewards and its judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import infer_align
from infer_align.demo import world

QUESTION: Any = [{"role": "user", "content": world.prompts(1, seed=11)[0]}]
REWARDS = {"quality": 1.0, "preference.helpfulness": 1.0, "preference.verbosity": 0.5}


@pytest.fixture(scope="module")
def live(serve: Callable[[str], Any]) -> Any:
    pytest.importorskip("transformers")
    demo = Path(infer_align.__file__).parent / "demo" / "infer-align.toml"
    return serve(demo.read_text(encoding="utf-8"))


def ask(live: Any, align: Any, **fields: Any) -> Any:
    """Return the report of a request for the best of eight."""
    body = {
        "messages": QUESTION,
        "max_tokens": 48,
        "seed": 3,
        "align": {"best_of_n": {"n": 8}, "rewards": REWARDS, "details": "candidates", **align},
        **fields,
    }
    answer = live.post(body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.slow
def test_a_lottery_is_reported_and_repeats_with_its_seed(live: Any) -> None:
    align = {"select": {"rule": "tilted", "beta": 2.0}}
    first = ask(live, align)
    assert ask(live, align)["choices"] == first["choices"]
    report = first["align"]
    assert report["selection"]["rule"] == "tilted"
    chances = report["selection"]["distribution"]
    assert sum(chances) == pytest.approx(1)
    assert f"with probability {chances[report['selected']]:.3g} by" in report["reason"]
    # Its candidates are the same under any seed of the lottery, which is the request's.
    drawn = {ask(live, align, seed=seed)["align"]["selected"] for seed in range(8)}
    assert len(drawn) > 1


def test_several_answers_are_drawn_without_replacement(live: Any) -> None:
    answer = ask(live, {"select": {"rule": "tilted", "beta": 5.0}}, n=8)
    texts = sorted(choice["message"]["content"] for choice in answer["choices"])
    drawn = [c["choice"]["message"]["content"] for c in answer["align"]["candidates"]]
    assert texts == sorted(drawn)


def test_a_judge_that_compares_gives_its_matrix_to_the_lottery(live: Any) -> None:
    align = {
        "rewards": {},
        "trust_judge": {"mode": "pairwise"},
        "select": {"rule": "minimax"},
    }
    report = ask(live, align)["align"]
    selection = report["selection"]
    assert {"rule", "distribution", "condorcet", "cycles", "worst_case"} == set(selection)
    assert selection["worst_case"] >= 0.5 - 1e-6
    if selection["condorcet"] is not None:
        assert selection["distribution"][selection["condorcet"]] == 1.0


def test_shapes_and_gates_stand_beside_the_raw_scores(live: Any) -> None:
    plain = ask(live, {})["align"]
    assert "selection" not in plain
    lengths = [c["scores"]["quality"]["value"] for c in plain["candidates"]]
    limit = sorted(lengths)[4]
    align = {"compose": {"quality": {"shape": "rank"}, "gates": {"quality": {"at_least": limit}}}}
    report = ask(live, align)["align"]
    assert report["selection"] == {"rule": "argmax"}
    raw = [c["scores"]["quality"]["value"] for c in report["candidates"]]
    assert raw == lengths
    ranks = [c["scores"]["quality"]["composed"] for c in report["candidates"]]
    assert (min(ranks), max(ranks)) == (0.0, 1.0)
    assert report["dropped"] == 4
    for candidate, value in zip(report["candidates"], raw, strict=True):
        assert (candidate["error"] or "").startswith("missed a gate: quality") == (value < limit)
        assert (candidate["objective"] is None) == (value < limit)


def test_the_selection_is_in_a_stream_and_in_scoring(live: Any) -> None:
    align = {"best_of_n": {"n": 4}, "rewards": REWARDS, "select": {"rule": "win_rate"}}
    body = {"messages": QUESTION, "max_tokens": 48, "seed": 3, "stream": True, "align": align}
    events = live.post(body).text.split("\n\n")
    reports = [json.loads(event[6:])["align"] for event in events if '"align"' in event]
    assert reports[-1]["selection"]["rule"] == "win_rate"
    scoring = {
        "messages": QUESTION,
        "candidates": ["Gladly! The owl is brown.", "Go away.", "The owl is brown."],
        "rewards": REWARDS,
        "compose": {"quality": {"shape": "par"}},
        "select": {"rule": "maxmin"},
    }
    scored = live.post(scoring, "/v1/align/score").json()
    assert scored["selection"]["rule"] == "maxmin"
    assert scored["reason"].startswith("highest worst reward of 3 candidates (")
    assert 0 < scored["candidates"][0]["scores"]["quality"]["composed"] < 1


@pytest.mark.parametrize(
    ("align", "param"),
    [
        ({"select": {"rule": "minimax"}, "rewards": {"quality": 1}}, "align.select.rule"),
        ({"select": {"rule": "nash"}}, "align.select.rule"),
        ({"select": {"beta": 0}}, "align.select.beta"),
        ({"select": {"within": -1}}, "align.select.within"),
        ({"select": {"order": ["quality", "quality"]}}, "align.select"),
        ({"compose": {"qualty": {"shape": "rank"}}}, "align.compose.qualty"),
        ({"compose": {"quality": {"shape": "log"}}}, "align.compose.quality.shape"),
        ({"compose": {"quality": {"refs": 5}}}, "align.compose.quality.refs"),
        ({"compose": {"gates": {"quality": {}}}}, "align.compose.gates.quality.at_least"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_spent(
    live: Any, align: Any, param: str
) -> None:
    answer = live.post({"messages": QUESTION, "align": {"best_of_n": {"n": 2}, **align}})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
