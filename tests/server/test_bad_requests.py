"""Wrong requests get an error in OpenAI's format that names the field; nothing is sampled."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

USER: Any = [{"role": "user", "content": "hello"}]


def refused(answer: httpx2.Response, status: int = 400) -> dict[str, Any]:
    """Check the format of an error and return it."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(error["message"]) < 1000
    return error


@pytest.fixture(autouse=True)
def _nothing_is_spent(numbers: Any) -> Iterator[None]:
    before = numbers.engine.sampled
    yield
    assert numbers.idle()
    assert numbers.engine.sampled == before, "a refused request reached the engine"


# --- the body as bytes ---


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not json",
        b'{"messages": [}',
        b"[]",
        b'"text"',
        b"null",
        b"17",
        b'{"messages": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": -Infinity}',
        b"\xff\xfe{}",
        b'{"model": "\xed\xa0\x80"}',
        '{"model": "fake"}'.encode("utf-16"),
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"a": 1} trailing',
        b"\x00",
    ],
)
def test_not_json(numbers: Any, body: bytes) -> None:
    assert refused(numbers.post(body))["code"] == "invalid_json"


def test_a_byte_order_mark_before_a_body_is_no_mistake(numbers: Any) -> None:
    answer = numbers.post(b'\xef\xbb\xbf{"messages": [{"role": "user", "content": 5}]}')
    assert refused(answer)["param"] == "messages[0].content", "the mark is not what is wrong"
    for body in (b"\xef\xbb\xbf", b"\xef\xbb\xbf\xef\xbb\xbf{}", b" \xef\xbb\xbf{}"):
        assert refused(numbers.post(body))["code"] == "invalid_json"


@pytest.mark.parametrize("place", ["message", "model", "align", "key"])
def test_lone_surrogates(numbers: Any, place: str) -> None:
    bad = "\\ud800"
    texts = {
        "message": f'{{"messages": [{{"role": "user", "content": "{bad}"}}]}}',
        "model": f'{{"model": "{bad}", "messages": []}}',
        "align": f'{{"messages": [], "align": {{"preset": "{bad}"}}}}',
        "key": f'{{"{bad}": 1}}',
    }
    assert "Unicode" in refused(numbers.post(texts[place].encode()))["message"]


def test_a_whole_surrogate_pair_is_text(numbers: Any) -> None:
    answer = numbers.post(
        b'{"messages": [{"role": "user", "content": 5}], "user": "\\ud83d\\ude00"}'
    )
    assert refused(answer)["param"] == "messages[0].content", "the pair is not what is wrong"


@pytest.mark.parametrize("depth", [129, 500, 900, 940, 950, 960, 970, 980, 990, 1000, 100_000])
@pytest.mark.parametrize(
    "template",
    ['{"messages": %s}', '{"align": {"best_of_n": %s}}', '{"align": {"rewards": {"number": %s}}}'],
)
def test_deep_nesting(numbers: Any, depth: int, template: str) -> None:
    body = template % ("[" * depth + "]" * depth)
    assert refused(numbers.post(body.encode()))["code"] == "invalid_json"


@pytest.mark.parametrize("depth", range(80, 126, 9))
def test_nesting_that_is_still_read_is_quoted_without_harm(numbers: Any, depth: int) -> None:
    deep: Any = 1
    for _ in range(depth):
        deep = {"a": [deep]} if depth % 2 else [deep]
    for body in (
        {"messages": deep},
        {"messages": USER, "align": {"best_of_n": {"n": deep}}},
        {"messages": USER, "n": deep},
    ):
        refused(numbers.post(body))


def test_huge_body_that_announces_itself(serve: Any) -> None:
    live = serve('[limits]\nmax_body_bytes = 100000\n[engine]\nkind = "fake"\n')
    with socket.create_connection(("127.0.0.1", live.port), timeout=60) as raw:
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{"
        )
        answer = raw.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413"), "refused before it is read"
    assert b"body_too_large" in answer


def test_huge_body_in_chunks(serve: Any) -> None:
    live = serve('[limits]\nmax_body_bytes = 100000\n[engine]\nkind = "fake"\n')

    def endless() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * 16_384

    # WriteError: the server has answered and closed while we still wrote.
    with live.http() as http, contextlib.suppress(httpx2.WriteError):
        assert (
            refused(http.post("/v1/chat/completions", content=endless()), 413)["code"]
            == "body_too_large"
        )
    assert live.get("/health").status_code == 200
    exact = json.dumps({"messages": USER, "user": ""}).encode()
    padded = exact[:-2] + b"x" * (100_000 - len(exact)) + exact[-2:]
    assert live.post(padded).status_code == 200
    assert live.post(padded[:-2] + b"x" + padded[-2:]).status_code == 413


@pytest.mark.parametrize(
    "headers",
    [{"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}],
)
def test_the_body_counts_not_its_announced_type(numbers: Any, headers: dict[str, str]) -> None:
    assert refused(numbers.post(b"a=b", headers=headers))["code"] == "invalid_json"


# --- fields of the wrong type or range ---

WRONG: dict[str, list[Any]] = {
    "messages": [
        None,
        [],
        "text",
        {},
        5,
        [5],
        ["x"],
        [{}],
        [{"role": "user"}],
        [{"role": 5, "content": "x"}],
        [None],
    ],
    "model": [5, [], {}, True],
    "n": [0, -1, 1.5, "2", True, [1], {}, 10**6, 10**30, 129],
    "seed": ["a", 1.5, True, [], 2**63, -(2**63) - 1, {}],
    "stream": ["yes", 1, 0, [], {}],
    "temperature": ["hot", -1, 3, True, [], {}, 10**400],
    "top_p": [0, 2, "x", True, [], 10**400],
    "max_tokens": [0, -5, 1.5, "5", True, [], {}, 10**400, "abc"],
    "max_completion_tokens": [0, -5, 1.5, "5", True, [1], {}, "abc"],
    "stop": [5, [5], {}, [""], ["x"] * 17],
    "presence_penalty": ["x", 5, True],
    "frequency_penalty": ["x", -5, []],
    "align": [5, "best_of_n", [], True, [{}], 0, "", False],
}


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for f, values in WRONG.items() for v in values]
)
def test_wrong_value(numbers: Any, field: str, value: object) -> None:
    error = refused(numbers.post({"model": "fake", "messages": USER, field: value}))
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(field)
    assert field in error["message"]


@pytest.mark.parametrize("value", [b"1e999", b"-1e999"])
@pytest.mark.parametrize("field", ["temperature", "n", "seed", "max_tokens", "top_p"])
def test_infinity_by_exponent(numbers: Any, field: str, value: bytes) -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}], "%s": %s}' % (field.encode(), value)
    assert refused(numbers.post(body))["param"] == field


@pytest.mark.parametrize(
    "options", [5, "usage", [], True, {"include_usage": "yes"}, {"include_usages": True}]
)
def test_wrong_stream_options(numbers: Any, options: object) -> None:
    error = refused(numbers.post({"messages": USER, "stream": True, "stream_options": options}))
    assert error["param"].startswith("stream_options")


def test_stream_options_without_a_stream(numbers: Any) -> None:
    assert (
        refused(numbers.chat(stream_options={"include_usage": True}))["param"] == "stream_options"
    )


@pytest.mark.parametrize(
    "content",
    [
        5,
        {},
        True,
        [5],
        [None],
        [{}],
        [{"type": 5}],
        [{"type": "text"}],
        [{"type": "text", "text": 5}],
        [{"type": "text", "text": None}],
    ],
)
def test_wrong_content(numbers: Any, content: object) -> None:
    assert refused(numbers.chat(messages=[{"role": "user", "content": content}]))[
        "param"
    ].startswith("messages[0]")


@pytest.mark.parametrize("prompt", [None, 5, [], {}, True])
def test_wrong_prompt(numbers: Any, prompt: object) -> None:
    assert refused(numbers.post({"prompt": prompt}, "/v1/completions"))["param"] == "prompt"


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/chat/completions", {}, "messages"),
        ("/v1/completions", {}, "prompt"),
        ("/v1/align/score", {"candidates": ["1"]}, "messages"),
        ("/v1/align/score", {"messages": USER}, "candidates"),
        ("/v1/align/judge", {"candidates": ["1"]}, "messages"),
        ("/v1/align/judge", {"messages": USER}, "candidates"),
        ("/v1/rerank", {"documents": ["1"]}, "query"),
        ("/v1/rerank", {"query": "1"}, "documents"),
        ("/v1/rerank", {"query": "1", "documents": [{"txt": "1"}]}, "documents[0].text"),
    ],
)
def test_a_missing_field_is_required(
    numbers: Any, path: str, body: dict[str, Any], field: str
) -> None:
    error = refused(numbers.post(body, path))
    assert error["param"] == field
    assert error["message"].startswith(f"{field}: is required")


@pytest.mark.parametrize(("value", "text"), [(None, "null"), (True, "true"), (False, "false")])
def test_values_have_their_names_in_json(numbers: Any, value: object, text: str) -> None:
    error = refused(numbers.post({"messages": value}, "/v1/chat/completions"))
    assert error["message"].startswith(f"messages: {text} is not allowed")


ALIGN: list[tuple[Any, str, str]] = [
    ({"best_of_m": {}}, "align.best_of_m", "did you mean 'best_of_n'?"),
    ({"xyzzy": 1}, "align.xyzzy", "known: "),
    ({"best_of_n": 8}, "align.best_of_n", '{"n": 8}'),
    ({"best_of_n": []}, "align.best_of_n", "not an object"),
    ({"best_of_n": {"m": 8}}, "align.best_of_n.m", "known: n"),
    ({"best_of_n": {"nn": 8}}, "align.best_of_n.nn", "did you mean 'n'?"),
    ({"best_of_n": {"n": 0}}, "align.best_of_n.n", "greater than or equal to 1"),
    ({"best_of_n": {"n": "8"}}, "align.best_of_n.n", "integer"),
    ({"best_of_n": {"n": 2.5}}, "align.best_of_n.n", "integer"),
    ({"best_of_n": {"n": True}}, "align.best_of_n.n", "integer"),
    ({"best_of_n": {"n": 10**6}}, "align.best_of_n.n", "128"),
    ({"best_of_n": {"n": 10**12}}, "align.best_of_n.n", "128"),
    ({"best_of_n": {"n": 10**50}}, "align.best_of_n.n", "128"),
    ({"ensemble": {"objective": "max"}}, "align.ensemble.objective", "'mean', 'wco' or 'uwo'"),
    (
        {"ensemble": {"uncertainty_weight": -0.5}},
        "align.ensemble.uncertainty_weight",
        "greater than or equal to 0",
    ),
    ({"ensemble": {"uncertainty_weight": 10**400}}, "align.ensemble.uncertainty_weight", "finite"),
    ({"ensemble": {"standardize": "yes"}}, "align.ensemble.standardize", "boolean"),
    ({"rewards": {"number": -1}}, "align.rewards.number", "from 0"),
    ({"rewards": {"number": 10**400}}, "align.rewards.number", "from 0"),
    ({"rewards": {"number": "1"}}, "align.rewards.number", "number"),
    ({"rewards": {"number": True}}, "align.rewards.number", "number"),
    ({"rewards": {"numbers": 1}}, "align.rewards.numbers", "did you mean 'number'?"),
    ({"rewards": ["number"]}, "align.rewards", "not an object"),
    ({"best_of_n": {}, "rewards": {}}, "align.rewards", "nothing to choose by"),
    ({"best_of_n": {}, "rewards": {"number": 0}}, "align.rewards", "nothing to choose by"),
    (
        {"budget": {"completion_tokens": 0}},
        "align.budget.completion_tokens",
        "greater than or equal to 1",
    ),
    ({"budget": {"completion_tokens": 1.5}}, "align.budget.completion_tokens", "integer"),
    ({"budget": {"deadline_seconds": 0}}, "align.budget.deadline_seconds", "greater than 0"),
    ({"budget": {"deadline_seconds": -1}}, "align.budget.deadline_seconds", "greater than 0"),
    ({"budget": {"deadline": 3}}, "align.budget.deadline", "deadline_seconds"),
    ({"details": "all"}, "align.details", "none, scores, candidates"),
    ({"details": ["none"]}, "align.details", "none, scores, candidates"),
    ({"preset": "bset"}, "align.preset", "did you mean 'best'?"),
    ({"preset": 5}, "align.preset", "not configured"),
    ({"preset": []}, "align.preset", "not configured"),
    ({"preset": ""}, "align.preset", "not configured"),
    ({"preset": False}, "align.preset", "not configured"),
    (
        {"dpa": {"direction": {"verbos": 1}}},
        "align.dpa.direction.verbos",
        "did you mean 'verbosity'?",
    ),
    ({"rps": {}}, "align.rps", "give align.dpa.direction too"),
    ({"vas": {"beta": {"x": 1}}}, "align.vas", "needs steer"),
    ({"trust_judge": {"scale": 7}}, "align.trust_judge.scale", "5, 10 or 100"),
    ({"trust_judge": {"criteria": ""}}, "align.trust_judge.criteria", "must be words"),
]


@pytest.mark.parametrize(("align", "param", "hint"), ALIGN)
def test_wrong_align(numbers: Any, align: object, param: str, hint: str) -> None:
    for extra in ({}, {"stream": True}):
        error = refused(numbers.chat(align, **extra))
        assert error["param"] == param
        assert hint in error["message"], error["message"]


@pytest.mark.parametrize("objective", ["mean", "wco", "uwo"])
def test_huge_words_are_not_echoed(numbers: Any, objective: str) -> None:
    huge = objective * 300_000
    for align in (
        {huge: 1},
        {"preset": huge},
        {"details": huge},
        {"rewards": huge},
        {"best_of_n": {huge: 1}},
        {"rewards": {huge: 1}},
    ):
        refused(numbers.chat(align))
    refused(numbers.chat(model=huge), 404)
    refused(numbers.chat(model=f"fake@{huge}"), 404)
    refused(numbers.chat(n=huge))


def test_more_answers_than_candidates(numbers: Any) -> None:
    assert refused(numbers.chat({"best_of_n": {"n": 2}}, n=3))["param"] == "n"


def test_budget_counts_the_worst_case(numbers: Any) -> None:
    error = refused(
        numbers.chat({"best_of_n": {"n": 4}, "budget": {"completion_tokens": 39}}, max_tokens=10)
    )
    assert error["code"] == "over_budget"
    assert "40" in error["message"]


def test_over_the_servers_limit(numbers: Any) -> None:
    error = refused(numbers.chat({"best_of_n": {"n": 100}}, max_tokens=4000))
    assert error["code"] == "over_limit"
    assert error["param"] == "max_tokens"


@pytest.mark.parametrize("model", ["gpt-4", "fake@", "@best", "fake@best@best", "", "Fake"])
def test_unknown_model(numbers: Any, model: str) -> None:
    assert refused(numbers.chat(model=model), 404)["param"] == "model"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"candidates": None}, "candidates"),
        ({"candidates": []}, "candidates"),
        ({"candidates": "1"}, "candidates"),
        ({"candidates": [1]}, "candidates.0"),
        ({"candidates": ["1"] * 129}, "candidates"),
        ({"messages": None}, "messages"),
        ({"reward": {}}, "reward"),
        ({"model": 5}, "model"),
        ({"rewards": {"nope": 1}}, "rewards.nope"),
        ({"rewards": 5}, "rewards"),
        ({"ensemble": {"objective": "x"}}, "ensemble.objective"),
        ({"dpa": {}}, "dpa.direction"),
        ({"dpa": {"direction": {"helpful": 1}}}, "dpa.direction.helpful"),
        ({"trust_judge": {"scale": 7}}, "trust_judge.scale"),
        ({"rps": {}}, "rps"),
        ({"best_of_n": {"n": 2}}, "best_of_n"),
        ({"vas": {}}, "vas"),
    ],
)
def test_wrong_score_request(numbers: Any, change: Any, param: str) -> None:
    body = {"messages": USER, "candidates": ["1", "2"], **change}
    assert refused(numbers.post(body, "/v1/align/score"))["param"] == param
