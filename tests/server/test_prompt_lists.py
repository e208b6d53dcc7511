"""A list as `prompt`: every prompt is answered as it would be alone, in one response."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.conftest import Live, Serve

PATH = "/v1/completions"
# The fake engine answers by the index of the candidate and repeats the prompt with echo.
FAKE = '[engine]\nkind = "fake"\n[rewards.brevity]\nkind = "rules"\nwords_weight = -1.0\n'
EMBEDDED = (
    '[engine]\nkind = "transformers"\nmodel = "demo"\n'
    '[rewards.brevity]\nkind = "rules"\nwords_weight = -1.0\n'
)
PROMPTS = ["the owl", "a crow eats", "The colour of"]
BEST = {"best_of_n": {"n": 3}}
ENGINES = pytest.mark.parametrize(
    "config", [FAKE, pytest.param(EMBEDDED, marks=pytest.mark.slow)], ids=["fake", "transformers"]
)


def complete(live: Live, prompt: object, **fields: Any) -> Any:
    body = {"prompt": prompt, "max_tokens": 6, "seed": 5, **fields}
    answer = live.post(body, PATH)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refuse(live: Live, prompt: object, **fields: Any) -> Any:
    answer = live.post({"prompt": prompt, "max_tokens": 6, **fields}, PATH)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


@ENGINES
@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"align": BEST}, {"align": BEST, "n": 2}])
def test_every_prompt_is_answered_as_alone(
    serve: Serve, config: str, fields: dict[str, Any]
) -> None:
    live = serve(config)
    alone = [complete(live, prompt, **fields) for prompt in PROMPTS]
    together = complete(live, PROMPTS, **fields)
    expected = [choice for each in alone for choice in each["choices"]]
    texts = [choice["text"] for choice in together["choices"]]
    assert texts == [choice["text"] for choice in expected]
    assert [choice["index"] for choice in together["choices"]] == list(range(len(expected)))
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert together["usage"][name] == sum(each["usage"][name] for each in alone)
    details = [each["usage"]["completion_tokens_details"] for each in alone]
    rejected = sum(each["rejected_prediction_tokens"] for each in details)
    total_details = together["usage"]["completion_tokens_details"]
    assert total_details["rejected_prediction_tokens"] == rejected


@ENGINES
@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"align": BEST}])
def test_a_stream_has_the_same_texts(serve: Serve, config: str, fields: dict[str, Any]) -> None:
    live = serve(config)
    together = complete(live, PROMPTS, **fields)
    body = {"prompt": PROMPTS, "max_tokens": 6, "seed": 5, **fields}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    stream = live.post({**body, **options}, PATH).text
    lines = [line.removeprefix("data: ") for line in stream.splitlines() if line[:6] == "data: "]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    texts = dict.fromkeys(range(len(together["choices"])), "")
    finishes: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
            if choice["finish_reason"]:
                finishes[choice["index"]] = choice["finish_reason"]
    choices = together["choices"]
    assert texts == {choice["index"]: choice["text"] for choice in choices}
    assert finishes == {choice["index"]: choice["finish_reason"] for choice in choices}
    assert chunks[-1]["usage"]["completion_tokens"] == together["usage"]["completion_tokens"]
    assert ("align" in chunks[-1]) == ("align" in fields)


def test_each_prompt_has_a_report(serve: Serve) -> None:
    live = serve(FAKE)
    report = complete(live, PROMPTS, align=BEST)["align"]
    assert [len(each["candidates"]) for each in report["prompts"]] == [3, 3, 3]
    assert complete(live, PROMPTS[:1], align=BEST)["align"]["methods"] == ["best_of_n"]


def test_a_list_of_one_prompt_is_that_prompt(serve: Serve) -> None:
    live = serve(FAKE)
    one = complete(live, ["the owl"], align=BEST)
    same = complete(live, "the owl", align=BEST)
    volatile = ("id", "created")
    for answer in (one, same):
        answer["align"].pop("timing")
        for name in volatile:
            answer.pop(name)
    assert one == same


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([], "prompt"),
        ([[]], "prompt[0]"),
        ([1, -2, 3], "prompt[1]"),
        ([1, True], "prompt[1]"),
        ([1, 2.5], "prompt[1]"),
        ([1, "a"], "prompt[1]"),
        ([[1], [2, "3"]], "prompt[1]"),
        ([[1], 2], "prompt[1]"),
        ([None], "prompt[0]"),
        (["a", [1, 2]], "prompt[1]"),
        (["a", None], "prompt[1]"),
        (7, "prompt"),
        ({"a": "b"}, "prompt"),
    ],
)
def test_other_lists_are_refused_by_name(serve: Serve, prompt: object, param: str) -> None:
    error = refuse(serve(FAKE), prompt)
    assert error["param"] == param
    assert "string" in error["message"]


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"align": BEST}, {"echo": True}])
def test_token_ids_are_answered_as_the_text_that_they_spell(
    serve: Serve, fields: dict[str, Any]
) -> None:
    live = serve(EMBEDDED)
    texts = [complete(live, prompt, **fields)["choices"] for prompt in PROMPTS]
    engine: Any = live.service.engine
    tokenizer = engine.frozen.tokenizer
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    alone = [complete(live, tokens, **fields)["choices"] for tokens in ids]
    assert alone == texts
    together = complete(live, ids, **fields)["choices"]
    expected = [choice["text"] for choices in texts for choice in choices]
    assert [each["text"] for each in together] == expected


@pytest.mark.slow
def test_token_ids_that_the_model_lacks_are_refused(serve: Serve) -> None:
    live = serve(EMBEDDED)
    for fields in ({}, {"align": BEST}):
        error = refuse(live, [5, 99_999], **fields)
        assert error["param"] == "prompt"
        assert "99999 is not a token id" in error["message"]


def test_the_fake_engine_reads_token_ids_as_words(serve: Serve) -> None:
    live = serve(
        '[engine]\nkind = "fake"\nreplies = [{text = "{prompt}"}]\n'
        '[rewards.brevity]\nkind = "rules"\nwords_weight = -1.0\n'
    )
    answer = complete(live, [[3, 1], [2]], align=BEST)
    assert [choice["text"] for choice in answer["choices"]] == ["3 1", "2"]
    assert answer["usage"]["prompt_tokens"] == 3
    assert complete(live, [7, 7])["choices"][0]["text"] == "7 7"


def test_an_upstream_gets_token_ids_without_align_only(serve: Serve) -> None:
    behind = serve('[engine]\nkind = "fake"\nreplies = [{text = "{prompt}"}]\n')
    front = serve(
        f'[engine]\nkind = "openai"\nurls = ["{behind.base_url}"]\n'
        '[rewards.brevity]\nkind = "rules"\nwords_weight = -1.0\n'
    )
    assert complete(front, [3, 1])["choices"][0]["text"] == "3 1"
    error = refuse(front, [3, 1], align=BEST)
    assert error["param"] == "prompt"
    assert "send the prompt as text" in error["message"]


def test_prompts_together_stay_within_the_limits_of_one_request(serve: Serve) -> None:
    live = serve(FAKE + "[limits]\nmax_candidates = 6\nmax_completion_tokens = 60\n")
    assert len(complete(live, ["a"] * 6)["choices"]) == 6
    many = refuse(live, ["a"] * 7)
    assert (many["param"], many["code"]) == ("prompt", "too_many_candidates")
    assert refuse(live, ["a"] * 3, align=BEST)["param"] == "align.best_of_n.n"
    assert refuse(live, ["a"] * 6, max_tokens=11)["code"] == "over_limit"
    budget = {"budget": {"completion_tokens": 30}}
    assert refuse(live, ["a"] * 6, align=budget)["code"] == "over_budget"


def test_prompts_are_admitted_and_charged_as_one_request(serve: Serve) -> None:
    live = serve(
        FAKE + "[limits]\nmax_running = 1\nmax_queue = 0\ncandidate_tokens_per_minute = 40\n"
    )
    assert len(complete(live, ["a"] * 5)["choices"]) == 5
    assert live.idle()
    refused = live.post({"prompt": ["a"] * 6, "max_tokens": 8}, PATH)
    assert refused.status_code == 429, refused.text
    assert refused.json()["error"]["code"] == "token_budget_exceeded"
    assert live.idle()


def test_prompts_over_a_whole_budget_are_answered_if_it_is_full(serve: Serve) -> None:
    live = serve(FAKE + "[limits]\ncandidate_tokens_per_minute = 41\n")
    assert len(complete(live, ["a"] * 6, max_tokens=8)["choices"]) == 6
    assert live.idle()
    refused = live.post({"prompt": ["a"] * 6, "max_tokens": 8}, PATH)
    assert refused.status_code == 429, refused.text
    assert "This request may need 48; " in refused.json()["error"]["message"]


def test_a_failure_of_one_prompt_fails_the_request_and_cancels_the_others(serve: Serve) -> None:
    live = serve(
        '[engine]\nkind = "fake"\n'
        'replies = [{text = "1 2 3 4 5 6 7 8 9", seconds_per_token = 3600.0}]\n'
    )
    align = {"budget": {"deadline_seconds": 0.05}}
    answer = live.post({"prompt": ["a", "b"], "max_tokens": 6, "align": align}, PATH)
    assert answer.status_code == 504, answer.text
    assert live.idle()
