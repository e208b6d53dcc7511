"""Generated compositions of methods are answered consistently, or refused by the field's name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.align_fuzz import fuzz
from tests.server.align_grammar import Grammar

SECTIONS = """
[rewards.brevity]
kind = "rules"
words_weight = -1.0
[rewards.owls]
kind = "rules"
regex = "owl"
[traits.polite]
prompt = "Answer politely."
[presets.best]
best_of_n = {n = 3}
[limits]
max_candidates = 16
[server]
default_rewards = {brevity = 1.0}
"""
FAKE = """
[engine]
kind = "fake"
replies = [
    {text = "candidate 3", estimates = {helpful = 1.0}},
    {text = "an owl", estimates = {helpful = 0.0}},
    {text = "candidate 9", estimates = {helpful = 2.0}},
]
"""
USER = {"messages": [{"role": "user", "content": "hello"}]}
EMBEDDED = """
[engine]
kind = "transformers"
model = "demo"
[values.helpful]
kind = "head"
path = "demo/value-helpful.safetensors"
"""


def test_a_seed_generates_the_same_requests(serve: Any) -> None:
    document = serve(FAKE + SECTIONS).get("/openapi.json").json()
    first = [each.body for each in Grammar(document, 3).requests(20)]
    assert first == [each.body for each in Grammar(document, 3).requests(20)]
    assert first != [each.body for each in Grammar(document, 4).requests(20)]


def test_every_method_is_generated_with_others(serve: Any) -> None:
    document = serve(FAKE + SECTIONS).get("/openapi.json").json()
    composed: set[str] = set()
    for sent in Grammar(document, 0).requests(400):
        align = sent.body.get("align")
        if isinstance(align, dict) and len(align) > 1:
            composed |= align.keys()
    assert composed >= document["components"]["schemas"]["Align"]["properties"].keys()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_scripted_engine_answers_or_names_the_field(serve: Any, seed: int) -> None:
    live = serve(FAKE + SECTIONS)
    wrong, answers = fuzz(live, seed, 250)
    assert not wrong, "\n".join(wrong)
    statuses = {key.split()[1] for key in answers}
    assert {"200", "400"} <= statuses
    assert live.idle()


@pytest.mark.slow
def test_the_embedded_engine_answers_or_names_the_field(serve: Any) -> None:
    pytest.importorskip("torch")
    wrong, answers = fuzz(serve(EMBEDDED + SECTIONS), 2, 120)
    assert not wrong, "\n".join(wrong)
    assert answers["/v1/chat/completions 200"] > 0


@pytest.mark.parametrize(
    ("align", "param", "message"),
    [
        ({"": 1}, 'align.""', 'align."": no such key'),
        (
            {"trust_judge": {"aspects": {"a b": "x"}}},
            "align.trust_judge.aspects.a b",
            "must match pattern",
        ),
        ({"trust_judge": {"aspects": ["a b"]}}, "align.trust_judge.aspects.0", "must match"),
        (
            {"trust_judge": {"aspects": 3}},
            "align.trust_judge.aspects",
            "must be an object, or be a list",
        ),
    ],
)
def test_a_fault_that_was_fuzzed_is_named(serve: Any, align: Any, param: str, message: str) -> None:
    answer = serve(FAKE + SECTIONS).chat(align)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), json.dumps(error)
    assert message in error["message"]
    assert "constrained" not in error["message"]


def test_a_judge_names_the_field_that_excludes_others(serve: Any) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "candidates": ["a"]}
    live = serve(FAKE + SECTIONS)
    for fields, param in (
        ({"criteria": "short", "aspects": ["tone"]}, "criteria"),
        ({"principles": [{"text": "short", "weight": 0}]}, "principles"),
        ({"aspects": ["tone"], "rubric": "short"}, "aspects"),
    ):
        error = live.post({**body, **fields}, "/v1/align/judge").json()["error"]
        assert error["param"] == param
        assert error["message"].startswith(f"{param}: ")


def test_a_wrong_method_lists_the_methods_of_all_routes_of_the_path(
    serve: Any, tmp_path: Any
) -> None:
    live = serve(f'{FAKE}{SECTIONS}[profiles]\nstore = "sqlite:///{tmp_path}/profiles.db"\n')
    with live.http() as client:
        answer = client.options("/v1/align/profiles/ada")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "DELETE, GET, HEAD"


@pytest.mark.slow
def test_a_field_without_a_name_is_quoted(serve: Any) -> None:
    live = serve(EMBEDDED + SECTIONS)
    for path, body in (
        ("/v1/chat/completions", {**USER, "": 1}),
        ("/v1/completions", {"prompt": "hello", "": 1}),
        ("/v1/align/score", {**USER, "candidates": ["a"], "": 1}),
    ):
        error = live.post(body, path).json()["error"]
        assert (error["param"], error["code"]) == ('""', "unknown_field")
        assert error["message"].startswith('"": ')


def test_a_worst_case_of_judging_names_the_field_of_the_texts(serve: Any) -> None:
    small = SECTIONS.replace("[limits]", "[limits]\nmax_completion_tokens = 8")
    live = serve(f'{FAKE}{small}[rewards.trust_judge]\nkind = "trust_judge"\n')
    for path, body, field in (
        ("/v1/rerank", {"query": "a", "documents": ["b", "c"]}, "documents"),
        ("/v1/align/score", {**USER, "candidates": ["b", "c"]}, "candidates"),
    ):
        judge = {"trust_judge": {"votes": 64}, "rewards": {}}
        error = live.post({**body, **judge}, path).json()["error"]
        assert (error["param"], error["code"]) == (field, "over_limit"), error
        assert error["message"].endswith(
            f"; send fewer {field}, or choose a smaller scale or fewer votes of the judge."
        )
        one = {"documents": ["b"]} if field == "documents" else {"candidates": ["b"]}
        error = live.post({**body, **one, **judge}, path).json()["error"]
        assert error["message"].endswith("; choose a smaller scale or fewer votes of the judge.")


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("align", [None, {"best_of_n": {"n": 2}}])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", USER),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/completions", {"prompt": ["a", "b"]}),
    ],
)
def test_a_worst_case_names_the_limit_that_the_client_wrote(
    serve: Any, field: str, align: Any, path: str, body: dict[str, Any]
) -> None:
    live = serve(FAKE + SECTIONS.replace("[limits]", "[limits]\nmax_completion_tokens = 8"))
    error = live.post({**body, "align": align, field: 9}, path).json()["error"]
    assert (error["param"], error["code"]) == (field, "over_limit")
    assert error["message"].startswith(f"{field}: the worst case is ")
    assert f"; set a lower {field} or draw fewer candidates." in error["message"]


def test_a_huge_number_of_candidates_is_quoted_in_short(serve: Any) -> None:
    live = serve(FAKE + SECTIONS)
    for n in (10**300, 1e300):
        error = live.chat({"best_of_n": {"n": n}}).json()["error"]
        assert (error["param"], error["code"]) == ("align.best_of_n.n", "too_many_candidates")
        assert len(error["message"]) < 250


def test_token_ids_may_be_written_as_floats(serve: Any) -> None:
    live = serve(FAKE + SECTIONS)
    for prompt in ([4.0, 5], [[4.0], [5.0, 6]]):
        assert live.post({"prompt": prompt}, "/v1/completions").status_code == 200
    assert live.post({"prompt": [4.5]}, "/v1/completions").status_code == 400
