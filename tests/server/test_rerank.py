"""`/v1/rerank` over real HTTP: its form, its scores, its limits, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from infer_align import config as configuration
from tests.engines.openai.upstream import fake_upstream
from tests.server.conftest import Live, end, start
from tests.server.test_openapi import validator

DOCUMENTS = ["it is 3", "it is 9", {"text": "it is 5", "id": "c"}]
KEYS = """
[server]
api_keys_env = "TEST_RERANK_KEYS"
[limits]
max_documents = 2
requests_per_minute = 3
[engine]
kind = "fake"
[rewards.number]
kind = "callable"
function = "tests.server.scorers:number"
"""


def rerank(live: Live, **fields: Any) -> Any:
    answer = live.post({"query": "which?", "documents": DOCUMENTS, **fields}, "/v1/rerank")
    assert answer.status_code == 200, answer.text
    body = answer.json()
    schema = validator(live.get("/openapi.json").json(), "Reranked")
    jsonschema.validate(body, schema.schema, registry=schema._registry)
    return body


def refused(live: Live, **fields: Any) -> Any:
    answer = live.post({"query": "which?", "documents": DOCUMENTS, **fields}, "/v1/rerank")
    assert answer.status_code in {400, 404}, answer.text
    return answer.json()["error"]


def order(body: Any) -> list[int]:
    return [result["index"] for result in body["results"]]


def test_documents_are_ordered_by_the_default_reward(numbers: Live) -> None:
    body = rerank(numbers)
    assert order(body) == [1, 2, 0]
    scores = [result["relevance_score"] for result in body["results"]]
    expected = [1 / (1 + math.exp(-value)) for value in (9, 5, 3)]
    assert scores == pytest.approx(expected)
    # An object comes back as it was sent, a string as an object with its text.
    assert [result["document"] for result in body["results"]] == [
        {"text": "it is 9"},
        {"text": "it is 5", "id": "c"},
        {"text": "it is 3"},
    ]
    assert body["id"].startswith("rerank-")
    assert body["model"] == numbers.service.model
    assert body["meta"] == {"api_version": {"version": "1"}}


def test_raw_scores_top_n_and_documents_are_optional(numbers: Live) -> None:
    body = rerank(numbers, raw_scores=True, top_n=2.0, return_documents=False)
    assert body["results"] == [
        {"index": 1, "relevance_score": 9.0},
        {"index": 2, "relevance_score": 5.0},
    ]
    assert order(rerank(numbers, top_n=0)) == order(rerank(numbers, top_n=99)) == [1, 2, 0]


def test_the_model_may_name_a_reward_a_preset_or_a_model(numbers: Live) -> None:
    documents = ["a b 1", "a 2", "a b c 3"]
    assert order(rerank(numbers, model="brevity", documents=documents)) == [1, 0, 2]
    assert rerank(numbers, model="brevity")["model"] == "brevity"
    assert order(rerank(numbers, model="fake", documents=documents)) == [2, 1, 0]
    assert order(rerank(numbers, model="fake@three", documents=documents)) == [2, 1, 0]
    weights = {"number": 0.0, "brevity": 1.0}
    assert order(rerank(numbers, rewards=weights, documents=documents)) == [1, 0, 2]


def test_equal_scores_keep_the_order_of_the_documents(numbers: Live) -> None:
    body = rerank(numbers, model="constant", documents=["b", "a", "b"])
    assert order(body) == [0, 1, 2]


def test_a_document_without_a_score_is_a_warning(numbers: Live) -> None:
    body = rerank(numbers, model="picky")
    assert order(body) == [1, 2]
    (warning,) = body["meta"]["warnings"]
    assert warning.startswith("documents[0] has no result: not scored: ")
    assert "three is too much" in warning
    answer = numbers.post({"query": "q", "documents": ["a"], "model": "broken"}, "/v1/rerank")
    assert (answer.status_code, answer.json()["error"]["code"]) == (424, "reward_failed")


def test_shapes_and_gates_of_rewards_count(numbers: Live) -> None:
    gates = {"compose": {"gates": {"number": {"at_least": 4.0}}}}
    body = rerank(numbers, **gates)
    assert order(body) == [1, 2]
    assert "missed a gate" in body["meta"]["warnings"][0]


def test_documents_that_all_miss_a_gate_are_no_results(numbers: Live) -> None:
    gates = {"compose": {"gates": {"number": {"at_least": 100.0}}}}
    body = rerank(numbers, **gates)
    assert body["results"] == []
    assert [line[:12] for line in body["meta"]["warnings"]] == [f"documents[{i}]" for i in range(3)]
    assert body["meta"]["warnings"][1].endswith("missed a gate: number 9 is under at_least 100")


def test_an_unknown_model_may_be_meant_as_a_reward(numbers: Live) -> None:
    error = refused(numbers, model="brevty")
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert error["message"].endswith("did you mean 'brevity'?")
    listed = refused(numbers, model="?")["message"]
    assert "brevity" in listed
    assert numbers.service.model in listed


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"query": None}, "query"),
        ({"query": ""}, "query"),
        ({"query": ["which?"]}, "query"),
        ({"documents": None}, "documents"),
        ({"documents": []}, "documents"),
        ({"documents": "it is 3"}, "documents"),
        ({"documents": ["it is 3", 4]}, "documents[1]"),
        ({"documents": [{"text": None}]}, "documents[0].text"),
        ({"documents": [{"title": "it"}]}, "documents[0].text"),
        ({"documents": ["x 1"] * 1001}, "documents"),
        ({"top_n": -1}, "top_n"),
        ({"top_n": True}, "top_n"),
        ({"top_n": "2"}, "top_n"),
        ({"return_documents": 1}, "return_documents"),
        ({"documets": []}, "documets"),
        ({"select": {"rule": "minimax"}}, "select"),
        ({"model": 3}, "model"),
        ({"model": "brevty"}, "model"),
        ({"model": "number", "rewards": {"brevity": 1}}, "rewards"),
        ({"rewards": {"brevty": 1}}, "rewards.brevty"),
        ({"ensemble": {"objective": "max"}}, "ensemble.objective"),
    ],
)
def test_a_wrong_field_is_named(numbers: Live, fields: Any, param: str) -> None:
    assert refused(numbers, **fields)["param"] == param


def test_a_server_without_a_default_reward_says_which_to_name(serve: Callable[[str], Live]) -> None:
    live = serve('[engine]\nkind = "fake"\n')
    answer = live.post({"query": "q", "documents": ["a"]}, "/v1/rerank")
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "rewards"
    assert "name one as `model`" in answer.json()["error"]["message"]


def reranker(_: str, __: Any) -> Any:
    return {"results": [], "passed": True}


def test_a_model_that_only_the_upstream_has_is_passed_on(
    config_file: Callable[[str], Path],
) -> None:
    with fake_upstream() as up:
        up.answer = reranker
        text = f'[engine]\nkind = "openai"\nurls = ["{up.url}"]\nprobe = false\n'
        reward = '[rewards.number]\nkind = "callable"\nfunction = "tests.server.scorers:number"\n'
        live = start(configuration.load(config_file(text + reward)))
        try:
            body = {"query": "q", "documents": ["a 1"]}
            for fields in ({}, {"model": "up"}, {"model": "number"}):
                assert live.post({**body, **fields}, "/v1/rerank").json()["results"]
            assert not [path for path in up.paths if path.endswith("rerank")]
            passed = live.post({**body, "model": "reranker"}, "/v1/rerank").json()
            assert passed == {"results": [], "passed": True}
        finally:
            end(live)


def test_keys_limits_and_metrics_hold(
    serve: Callable[[str], Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_RERANK_KEYS", "secret")
    live = serve(KEYS)
    body = {"query": "q", "documents": ["is 1", "is 2"]}
    assert live.post(body, "/v1/rerank").status_code == 401
    headers = {"authorization": "Bearer secret"}
    assert live.post(body, "/v1/rerank", headers=headers).status_code == 200
    more = {**body, "documents": ["1", "2", "3"]}
    answer = live.post(more, "/v1/rerank", headers=headers)
    assert answer.json()["error"]["param"] == "documents"
    assert live.post(body, "/v1/rerank", headers=headers).status_code == 200
    assert live.post(body, "/v1/rerank", headers=headers).status_code == 429
    assert live.metric("infer_align_documents_total") == 4
    assert live.metric("infer_align_requests_total", route="/v1/rerank", status="200") == 2
