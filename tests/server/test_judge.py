"""The judge over HTTP: as a reward, in a preset, on another engine, and on its own route."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

USER: Any = [{"role": "user", "content": "hello there"}]
CONFIG = r"""
[engine]
kind = "fake"
replies = [{text = "fine 1"}, {text = "poor 2"}, {text = "great 3"}, {text = "rude 4"}]
labels = [
  {pattern = 'Criteria: short.*Answer <\d+>\npoor', probabilities = {"100" = 1.0}},
  {pattern = 'to 5 .*Answer <\d+>\ngreat', probabilities = {"4" = 1.0}},
  {pattern = 'to 10 .*Answer <\d+>\nfine', probabilities = {"5" = 0.5, "10" = 0.5}},
  {pattern = 'to 100 .*Answer <\d+>\nfine', probabilities = {"60" = 0.5}},
  {pattern = 'Answer <\d+>\npoor', probabilities = {"2" = 1.0}},
  {pattern = 'Answer <\d+>\ngreat', probabilities = {"90" = 0.5, "94" = 0.5}},
  {pattern = 'rude', probabilities = {"1" = 0.01, A = 0.01}},
  {pattern = 'Answer A <\d+>\ngreat', probabilities = {A = 0.8, B = 0.1, C = 0.1}},
  {pattern = 'Answer B <\d+>\ngreat', probabilities = {A = 0.1, B = 0.8, C = 0.1}},
  {pattern = 'Answer A', probabilities = {A = 0.3, B = 0.3, C = 0.4}},
]
[engines.other]
kind = "fake"
model = "the-other"
labels = [{pattern = "\npoor", probabilities = {"100" = 1.0}}, {probabilities = {"1" = 1.0}}]
[rewards.number]
kind = "callable"
function = "tests.server.scorers:number"
[rewards.critic]
kind = "trust_judge"
engine = "other"
criteria = "poverty"
[rewards.trust_judge]
kind = "trust_judge"
[presets.judged]
best_of_n = {n = 4}
rewards = {}
trust_judge = {criteria = "short", weight = 2.0}
"""


@pytest.fixture(scope="module")
def live(serve: Callable[[str], Any]) -> Any:
    return serve(CONFIG)


@pytest.fixture
def client(live: Any) -> Any:
    with openai.OpenAI(base_url=live.base_url, api_key="unused", max_retries=0, timeout=60) as sdk:
        yield sdk


def ask(client: openai.OpenAI, align: Any, **fields: Any) -> tuple[str, Any]:
    answer = client.chat.completions.create(
        model=fields.pop("model", "fake"), messages=USER, extra_body={"align": align}, **fields
    )
    return answer.choices[0].message.content or "", (answer.model_extra or {})["align"]


def values(align: Any, name: str = "trust_judge") -> list[Any]:
    return [candidate["scores"][name]["value"] for candidate in align["candidates"]]


def on_five(score: float, scale: int = 100) -> Any:
    return pytest.approx(1 + (score - 1) * 4 / (scale - 1))


def test_judged_best_of_8_with_criteria(client: openai.OpenAI, live: Any) -> None:
    before = len(live.engine.queries)
    text, align = ask(
        client, {"best_of_n": {"n": 8}, "rewards": {}, "trust_judge": {"criteria": "helpful"}}
    )
    assert text == "great 3"
    assert align["methods"] == ["best_of_n", "trust_judge"]
    assert values(align)[:4] == [on_five(60), on_five(2), on_five(92), None]
    assert "refusal" in align["candidates"][3]["error"]
    assert align["dropped"] == 2
    assert align["reports"]["trust_judge"] == {"mode": "score", "scale": 100, "drop_rate": 0.25}
    assert len(live.engine.queries) - before == 8 == align["usage"]["judge_calls"]
    assert align["usage"]["judge_completion_tokens"] == 8
    assert align["usage"]["judge_prompt_tokens"] > 8 * 20
    assert all(
        "Criteria: helpful." in q.messages[0]["content"] for q in live.engine.queries[before:]
    )


def test_by_preset(client: openai.OpenAI) -> None:
    text, align = ask(client, {}, model="fake@judged")
    assert text == "poor 2", "the shortest, says this judge"
    assert align["candidates"][1]["objective"] == 10.0, "twice the weight of a 5"


def test_pairwise_mode_reads_each_pair_twice_and_reports_the_relations(
    client: openai.OpenAI, live: Any
) -> None:
    before = len(live.engine.queries)
    text, align = ask(
        client, {"best_of_n": {"n": 4}, "rewards": {}, "trust_judge": {"mode": "pairwise"}}
    )
    assert text == "great 3"
    assert len(live.engine.queries) - before == 12 == align["usage"]["judge_calls"]
    report = align["reports"]["trust_judge"]
    assert {"pair": [0, 2], "relation": "smaller"} in report["comparisons"]
    assert {"pair": [0, 1], "relation": "equal"} in report["comparisons"]
    assert {"pair": [0, 3], "relation": None} in report["comparisons"]
    assert report["drop_rate"] == 0.5, "all three with the rude one"
    assert report["win_rates"]["2"] == 1.0
    assert report["cycles"] == []
    assert values(align)[2] == 5.0


def test_the_judge_is_weighted_with_other_rewards(client: openai.OpenAI) -> None:
    body: Any = {"best_of_n": {"n": 3}, "rewards": {"number": 1.0}, "trust_judge": {"weight": 0.5}}
    _, align = ask(client, body)
    for candidate in align["candidates"]:
        scores = candidate["scores"]
        assert candidate["objective"] == pytest.approx(
            scores["number"]["value"] + 0.5 * scores["trust_judge"]["value"]
        )
    _, watched = ask(client, {**body, "trust_judge": {"weight": 0}, "best_of_n": {"n": 4}})
    assert watched["selected"] == 3, (
        "a weight of 0 shows what the judge says, and lets it drop nobody"
    )
    assert values(watched)[3] is None


def test_scales_and_readouts(client: openai.OpenAI) -> None:
    body: Any = {"best_of_n": {"n": 3}, "rewards": {}}
    assert values(ask(client, {**body, "trust_judge": {"scale": 5}})[1]) == [
        3.0,
        on_five(2, 5),
        4.0,
    ]
    assert values(ask(client, {**body, "trust_judge": {"scale": 10}})[1])[0] == on_five(7.5, 10)
    assert values(ask(client, {**body, "trust_judge": {"readout": "geval"}})[1])[0] == on_five(30)
    assert values(ask(client, {**body, "trust_judge": {"readout": "published"}})[1])[1] == on_five(
        0
    )


def test_a_judge_on_another_engine(client: openai.OpenAI, live: Any) -> None:
    before = len(live.engine.queries)
    other = live.service.engines["other"]
    text, align = ask(client, {"best_of_n": {"n": 4}, "rewards": {"critic": 1.0}})
    assert text == "poor 2"
    assert values(align, "critic") == [1.0, 5.0, 1.0, 1.0]
    assert len(live.engine.queries) == before
    assert "Criteria: poverty." in other.queries[-1].messages[0]["content"]


def test_judges_are_read_only_where_they_are_named(client: openai.OpenAI, live: Any) -> None:
    before = len(live.engine.queries)
    _, align = ask(client, {"best_of_n": {"n": 4}})
    assert set(align["candidates"][0]["scores"]) == {"number"}
    assert len(live.engine.queries) == before
    assert live.service.rewards["critic"].uses_engine


def test_one_answer_can_be_judged_too(client: openai.OpenAI) -> None:
    text, align = ask(client, {"trust_judge": {}})
    assert text == "fine 1"
    assert values(align) == [on_five(60)]


def test_scoring_with_a_judge(live: Any) -> None:
    answer = live.post(
        {
            "messages": USER,
            "candidates": ["poor", "great"],
            "rewards": {},
            "trust_judge": {"scale": 100},
        },
        "/v1/align/score",
    ).json()
    assert answer["ranking"] == [1, 0]
    assert answer["usage"]["judge_calls"] == 2
    assert answer["reports"]["trust_judge"]["drop_rate"] == 0.0


def test_a_judge_without_a_reading_gives_no_score(live: Any) -> None:
    answer = live.post(
        {"messages": USER, "candidates": ["rude", "rude too"], "rewards": {}, "trust_judge": {}},
        "/v1/align/score",
    )
    assert answer.status_code == 424
    assert "refusal" in answer.json()["error"]["message"]


def test_metrics_count_the_judge(client: openai.OpenAI, live: Any) -> None:
    before = live.metric("infer_align_tokens_total", kind="judge")
    _, align = ask(client, {"best_of_n": {"n": 3}, "rewards": {}, "trust_judge": {}})
    spent = align["usage"]["judge_prompt_tokens"] + align["usage"]["judge_completion_tokens"]
    assert live.metric("infer_align_tokens_total", kind="judge") - before == spent


# --- /v1/align/judge ---


def judged(live: Any, candidates: list[str], **fields: Any) -> Any:
    answer = live.post({"messages": USER, "candidates": candidates, **fields}, "/v1/align/judge")
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_judging_both_ways(live: Any) -> None:
    response = judged(live, ["fine", "poor", "great", "fine too", "rude"])
    assert response["object"] == "align.judge"
    assert [c["score"] for c in response["candidates"]] == pytest.approx([60, 2, 92, 60, None])
    assert response["candidates"][2]["rescaled"] == on_five(92)
    assert response["candidates"][2]["win_rate"] == 1.0
    assert "refusal" in response["candidates"][4]["error"]
    assert len(response["pairs"]) == 10
    great = next(pair for pair in response["pairs"] if pair["pair"] == [0, 2])
    assert great["relation"] == "smaller"
    assert [order["B"] for order in great["orders"]] == pytest.approx([0.8, 0.1])
    assert response["conflict_ratio"] == pytest.approx(2 / 6), (
        "fine and poor are a tie to compare, not to score"
    )
    assert response["tie_rate"] == pytest.approx(3 / 6)
    assert response["nontransitivity"] == {"3": 0.0, "4": 0.0, "5": None}
    assert response["cycles"] == []
    assert response["drop_rate"] == {"score": pytest.approx(0.2), "pairwise": pytest.approx(0.4)}
    assert response["usage"]["judge_calls"] == 5 + 20


def test_judging_in_one_mode(live: Any) -> None:
    scored = judged(
        live, ["fine", "great"], mode="score", scale=10, criteria="short", readout="geval"
    )
    assert (scored["pairs"], scored["conflict_ratio"], scored["usage"]["judge_calls"]) == (
        [],
        None,
        2,
    )
    assert scored["candidates"][0]["score"] == pytest.approx(7.5)
    compared = judged(
        live,
        ["fine", "great"],
        mode="pairwise",
        rule="first_label",
        tolerance=0.1,
        schedule="swiss",
    )
    assert compared["candidates"][0] == {
        "index": 0,
        "score": None,
        "rescaled": None,
        "win_rate": 0.0,
        "error": None,
    }
    assert compared["usage"]["judge_calls"] == 2
    other = judged(live, ["poor", "great"], mode="score", judge="critic")
    assert [c["score"] for c in other["candidates"]] == [100.0, 1.0]


@pytest.mark.parametrize(
    ("change", "param", "hint"),
    [
        ({"scale": 7}, "scale", "5, 10 or 100"),
        ({"scale": "100"}, "scale", "5, 10 or 100"),
        ({"criteria": " "}, "criteria", "must be words"),
        ({"criteria": ""}, "criteria", "must be words"),
        ({"mode": "all"}, "mode", "'both'"),
        ({"readout": "first"}, "readout", "'geval'"),
        ({"rule": "coin"}, "rule", "'likelihood'"),
        ({"tolerance": -1}, "tolerance", "greater than or equal to 0"),
        ({"judge": "number"}, "judge", "is not a configured judge"),
        ({"candidates": []}, "candidates", "at least one"),
        ({"candidates": "ab"}, "candidates", "'ab'"),
        ({"candidates": ["a", None]}, "candidates.1", "null is not allowed; must be a string"),
        (
            {"candidates": [{"content": None}, "b"]},
            "candidates.0",
            "{'content': null} is not allowed",
        ),
        ({"messages": []}, "messages", "at least one"),
        ({"criterion": "x"}, "criterion", "did you mean 'criteria'?"),
        ({"model": 5}, "model", "string"),
    ],
)
def test_wrong_judging(live: Any, change: Any, param: str, hint: str) -> None:
    answer = live.post({"messages": USER, "candidates": ["a", "b"], **change}, "/v1/align/judge")
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert hint in answer.json()["error"]["message"]


def test_judging_without_any_reading_fails(live: Any) -> None:
    answer = live.post(
        {"messages": USER, "candidates": ["rude"], "mode": "score"}, "/v1/align/judge"
    )
    assert answer.status_code == 424
    assert "refusal" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("parameters", "param", "hint"),
    [
        ({"scale": 7}, "scale", "5, 10 or 100"),
        ({"criteria": ""}, "criteria", "must be words"),
        ({"criteria": "\n "}, "criteria", "must be words"),
        ({"criteria": 5}, "criteria", "string"),
        ({"mode": "both"}, "mode", "'score' or 'pairwise'"),
        ({"readout": "best"}, "readout", "'expected'"),
        ({"weight": -1}, "weight", "greater than or equal to 0"),
        ({"rule": "likelihood"}, "rule", "no such parameter"),
    ],
)
def test_wrong_parameters(live: Any, parameters: Any, param: str, hint: str) -> None:
    answer = live.chat({"trust_judge": parameters})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == f"align.trust_judge.{param}"
    assert hint in answer.json()["error"]["message"], answer.json()


@pytest.mark.parametrize(("mode", "readings"), [("score", 4), ("pairwise", 12)])
def test_the_worst_case_holds_the_judges_tokens(
    client: openai.OpenAI, mode: str, readings: int
) -> None:
    settings = {"best_of_n": {"n": 4}, "rewards": {}, "trust_judge": {"mode": mode}}
    _, within = ask(
        client, {**settings, "budget": {"completion_tokens": 4 * 10 + readings}}, max_tokens=10
    )
    assert within["usage"]["judge_completion_tokens"] == readings
    with pytest.raises(
        openai.BadRequestError, match=rf"4 candidates x 10 tokens \+ {readings} of judging"
    ):
        ask(
            client,
            {**settings, "budget": {"completion_tokens": 4 * 10 + readings - 1}},
            max_tokens=10,
        )


# --- a judge as it is configured, what it may cost, and when it fails ---

CONFIGURED = r"""
[engine]
kind = "fake"
replies = [{text = "fine 1"}, {text = "great 3"}]
labels = [{pattern = 'Criteria: kind to beginners', probabilities = {A = 0.9, "7" = 0.5, C = 0.1}}]
[engines.gone]
kind = "openai"
urls = "http://127.0.0.1:9/v1"
[rewards.number]
kind = "callable"
function = "tests.server.scorers:number"
[rewards.lost]
kind = "trust_judge"
engine = "gone"
[rewards.trust_judge]
kind = "trust_judge"
mode = "pairwise"
scale = 10
criteria = "kind to beginners"
readout = "geval"
[presets.brief]
best_of_n = {n = 2}
rewards = {}
trust_judge = {criteria = "brief", scale = 5}
[limits]
max_completion_tokens = 400
candidate_tokens_per_minute = 10_000
"""


@pytest.fixture(scope="module")
def configured(serve: Callable[[str], Any]) -> Any:
    return serve(CONFIGURED)


def test_omitted_settings_are_those_of_the_judge(configured: Any) -> None:
    body = {"best_of_n": {"n": 2}, "rewards": {}}
    for settings, mode, scale in (
        ({}, "pairwise", None),
        ({"mode": "score"}, "score", 10),
        ({"mode": "score", "scale": 5}, "score", 5),
    ):
        answer = configured.chat({**body, "trust_judge": settings}, max_tokens=20)
        report = answer.json()["align"]["reports"]["trust_judge"]
        assert (report["mode"], report.get("scale")) == (mode, scale)
        assert (
            "Criteria: kind to beginners." in configured.engine.queries[-1].messages[0]["content"]
        )
    scored = configured.chat({**body, "trust_judge": {"mode": "score"}}, max_tokens=20).json()[
        "align"
    ]["candidates"]
    assert [c["scores"]["trust_judge"]["value"] for c in scored] == [on_five(3.5, 10)] * 2, (
        "geval does not divide by the mass"
    )


def test_the_judges_route_knows_the_preset_of_the_models_name(configured: Any) -> None:
    response = judged(configured, ["a", "b"], model="fake@brief", mode="score")
    assert response["scale"] == 5
    assert "Criteria: brief." in configured.engine.queries[-1].messages[0]["content"]
    assert judged(configured, ["a", "b"], model="fake@brief", mode="score", scale=10)["scale"] == 10


def test_judging_and_scoring_are_limited_counted_and_charged(
    configured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = configured.service.tokens
    # The budget does not refill while the test runs.
    frozen = tokens._clock()
    monkeypatch.setattr(tokens, "_clock", lambda: frozen)

    def metric() -> float:
        return configured.metric("infer_align_tokens_total", kind="judge")

    many = [f"{i}" for i in range(30)]
    for path, body in (("judge", {}), ("score", {"rewards": {}, "trust_judge": {}})):
        answer = configured.post(
            {"messages": USER, "candidates": many, **body}, f"/v1/align/{path}"
        )
        assert answer.status_code == 400, answer.text
        assert (
            "over this server's limit of 400; send fewer candidates"
            in answer.json()["error"]["message"]
        )
        assert answer.json()["error"]["param"] == "candidates"
        available = tokens.available("127.0.0.1")
        counted = metric()
        usage = configured.post(
            {"messages": USER, "candidates": many[:5], **body}, f"/v1/align/{path}"
        ).json()["usage"]
        assert usage["judge_completion_tokens"] >= 20
        charged = available - tokens.available("127.0.0.1")
        assert charged == pytest.approx(usage["judge_completion_tokens"])
        assert metric() - counted == usage["judge_prompt_tokens"] + usage["judge_completion_tokens"]
    assert configured.idle()


def test_an_unreachable_judge_fails_only_requests_that_use_it(configured: Any) -> None:
    assert configured.get("/ready").status_code == 200
    assert (
        configured.chat(
            {"best_of_n": {"n": 2}, "rewards": {"number": 1}}, max_tokens=20
        ).status_code
        == 200
    )
    answer = configured.chat(
        {"best_of_n": {"n": 2}, "rewards": {"number": 1, "lost": 1}}, max_tokens=20
    )
    assert answer.status_code == 503
    assert "the upstream cannot be reached" in answer.json()["error"]["message"]


def test_the_prompt_of_a_text_completion_is_judged_too(configured: Any) -> None:
    body = {
        "model": "fake",
        "prompt": "Once upon a",
        "align": {"best_of_n": {"n": 2}, "rewards": {}, "trust_judge": {}},
    }
    assert configured.post(body, "/v1/completions").status_code == 200
    assert "Once upon a" in configured.engine.queries[-1].messages[1]["content"]


@pytest.mark.slow
def test_sixty_candidates_are_compared(serve: Callable[[str], Any]) -> None:
    live = serve('[engine]\nkind = "fake"\n[limits]\nmax_completion_tokens = 100_000\n')
    response = judged(live, [str(i) for i in range(60)], mode="pairwise")
    assert len(response["pairs"]) == 60 * 59 / 2
    assert response["nontransitivity"]["5"] == 0.0
