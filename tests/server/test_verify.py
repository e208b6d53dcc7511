"""Verdicts over real HTTP: /v1/align/verify, and /verify as the semantic router calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from tests.server.conftest import Live
from tests.server.test_openapi import validator

ANSWERS = [{"id": "a", "content": "it is 0.2"}, {"id": "b", "content": "it is 0.7"}]


def verify(live: Live, **fields: Any) -> Any:
    body = {"task": "how much?", "candidates": ANSWERS, "confidence": "identity", **fields}
    answer = live.post(body, "/v1/align/verify")
    assert answer.status_code == 200, answer.text
    schema = validator(live.get("/openapi.json").json(), "Verdict")
    jsonschema.validate(answer.json(), schema.schema, registry=schema._registry)
    return answer.json()


@pytest.mark.parametrize(
    ("texts", "thresholds", "disposition", "code"),
    [
        (["is 0.2", "is 0.7"], {}, "approve", "above_threshold"),
        (["is 0.5"], {}, "approve", "above_threshold"),
        (["is 0.2", "is 0.4"], {}, "redo", "below_threshold"),
        (["is 0.05", "is 0.01"], {}, "reject", "below_reject_threshold"),
        (["is 0.05"], {"reject": 0.0}, "redo", "below_threshold"),
        (["is 0.6", "is 0.7"], {"tie": 0.2}, "tie", "within_tie_margin"),
        (["is 0.6", "is 0.7"], {"tie": 0.05}, "approve", "above_threshold"),
        # An answer that is not approved cannot tie, and an answer does not tie with itself.
        (["is 0.45", "is 0.55"], {"tie": 0.2}, "approve", "above_threshold"),
        (["is 0.7", "is 0.7"], {"tie": 0.2}, "approve", "above_threshold"),
        (["surely 0.7", "is 0.7"], {}, "tie", "within_tie_margin"),
        # No confidence can be read from these.
        (["is 7", "is -1"], {}, "abstain", "not_scored"),
    ],
)
def test_the_thresholds_decide(
    numbers: Live, texts: list[str], thresholds: Any, disposition: str, code: str
) -> None:
    body = verify(numbers, candidates=texts, thresholds=thresholds)
    assert (body["disposition"], body["reason_codes"]) == (disposition, [code])
    assert (body["confidence"] is None) == (disposition == "abstain")


def test_the_evidence_stands_beside_the_verdict(numbers: Live) -> None:
    body = verify(numbers)
    assert body["scores"] == [
        {"candidate_id": "a", "confidence": 0.2},
        {"candidate_id": "b", "confidence": 0.7},
    ]
    assert body["not_scored"] == {}
    assert body["kind"] == "outcome_reward_model"
    assert body["version"].startswith("infer-align/")
    assert body["version"].endswith(" number")
    partly = verify(numbers, model=None, rewards={"picky": 1}, candidates=["is 0.3", "is 0.9"])
    assert partly["disposition"] == "approve"
    assert "three is too much" in partly["not_scored"]["0"]


def test_a_reward_that_gives_no_number_abstains_and_one_that_fails_is_an_error(
    numbers: Live,
) -> None:
    silent = verify(numbers, rewards={"silent": 1})
    assert (silent["disposition"], silent["confidence"]) == ("abstain", None)
    assert set(silent["not_scored"]) == {"a", "b"}
    body = {"task": "t", "candidates": ANSWERS, "rewards": {"broken": 1}}
    answer = numbers.post(body, "/v1/align/verify")
    assert (answer.status_code, answer.json()["error"]["code"]) == (424, "reward_failed")
    assert answer.headers["x-should-retry"] == "false"


def test_no_answer_is_approved_that_misses_a_gate(numbers: Live) -> None:
    for limit, disposition in ((0.5, "approve"), (0.9, "abstain")):
        body = verify(numbers, compose={"gates": {"number": {"at_least": limit}}})
        assert body["disposition"] == disposition
        assert body["not_scored"]["a"] == f"missed a gate: number 0.2 is under at_least {limit}"
        assert ("b" in body["not_scored"]) == (disposition == "abstain")


def test_members_that_disagree_abstain(serve: Callable[[str], Live]) -> None:
    pytest.importorskip("transformers")
    live = serve('[engine]\nkind = "transformers"\nmodel = "demo"\n' + DEMO_REWARD)
    fields = {"confidence": "sigmoid", "candidates": ["The owl eats mice.", "Go away."]}
    thresholds = {"approve": 0.0, "reject": 0.0, "tie": 0.0}
    assert verify(live, **fields, thresholds=thresholds)["disposition"] == "approve"
    strict = verify(live, **fields, thresholds={**thresholds, "max_std": 0.0})
    assert strict["reason_codes"] == ["members_disagree"]
    judged = verify(live, **fields, rewards={}, trust_judge={}, thresholds=thresholds)
    assert judged["kind"] == "llm_judge"
    assert judged["usage"]["completion_tokens"] == 2


DEMO_REWARD = """
[rewards.quality]
kind = "classifier"
models = ["demo/reward-0", "demo/reward-1"]
"""


def test_a_trusted_context_is_the_turn_of_the_system(serve: Callable[[str], Live]) -> None:
    live = serve(
        '[engine]\nkind = "fake"\n[rewards.context]\nkind = "callable"\n'
        'function = "tests.server.scorers:system_characters"\n'
    )
    body = verify(live, candidates=["x"], trusted_context=None, thresholds={"reject": 0})
    assert body["confidence"] == 0.0
    body = verify(live, candidates=["x"], trusted_context="c" * 60)
    assert (body["confidence"], body["disposition"]) == (0.6, "approve")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"task": None}, "task"),
        ({"task": ""}, "task"),
        ({"candidates": None}, "candidates"),
        ({"candidates": []}, "candidates"),
        ({"candidates": ["a"] * 129}, "candidates"),
        ({"candidates": [ANSWERS[0], ANSWERS[0]]}, "candidates.1.id"),
        ({"candidates": ["a", 1]}, "candidates.1"),
        ({"candidates": ["a", None]}, "candidates.1"),
        ({"candidates": [{"id": "a"}]}, "candidates.0.content"),
        ({"thresholds": {"approve": 1.5}}, "thresholds.approve"),
        ({"thresholds": {"approve": 0.2, "reject": 0.3}}, "thresholds.reject"),
        ({"thresholds": {"tei": 0.2}}, "thresholds.tei"),
        ({"confidence": "softmax"}, "confidence"),
        ({"trusted_context": 3}, "trusted_context"),
        ({"messages": []}, "messages"),
        ({"rewards": {"brevty": 1}}, "rewards.brevty"),
    ],
)
def test_a_wrong_field_is_named(numbers: Live, fields: Any, param: str) -> None:
    body = {"task": "t", "candidates": ANSWERS, **fields}
    answer = numbers.post(body, "/v1/align/verify")
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    if not fields.get("candidates", True):
        assert answer.json()["error"]["code"] == "no_candidate"


def test_a_candidate_may_be_a_text_or_an_object(numbers: Live) -> None:
    answer = numbers.post({"task": "t", "candidates": [["a"]]}, "/v1/align/verify")
    assert answer.status_code == 400
    allowed = 'must be a string or {"id": string, "content": string}.'
    assert answer.json()["error"]["message"].endswith(allowed)


def test_the_older_form_of_the_router_has_one_answer_and_one_threshold(numbers: Live) -> None:
    """The fields are those of AutoMixVerifierClient in vllm-project/semantic-router."""
    question = {"question": "how much?", "answer": "it is 0", "threshold": 0.7, "context": "c"}
    body = numbers.post(question, "/verify").json()
    assert body == {
        "confidence": 0.5,
        "should_escalate": True,
        "verified_count": 0,
        "total_samples": 1,
        "threshold": 0.7,
    }
    high = numbers.post({**question, "answer": "it is 9"}, "/verify").json()
    assert (high["should_escalate"], high["verified_count"]) == (False, 1)
    bad = numbers.post({**question, "threshold": 7}, "/verify")
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "threshold")


def test_verdicts_are_counted(numbers: Live) -> None:
    before = numbers.metric("infer_align_verdicts_total", disposition="approve")
    verify(numbers)
    assert numbers.metric("infer_align_verdicts_total", disposition="approve") == before + 1
