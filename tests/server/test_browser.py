"""Scripts of web pages may call the server from the configured origins, and from no others."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import NUMBERS, USER, Live, Serve

PAGE = "https://app.example.com"
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os,x-stainless-lang",
}
CHAT = "/v1/chat/completions"


@pytest.fixture
def open_to_page(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Live:
    """A server with keys that one web page may call."""
    monkeypatch.setenv("BROWSER_KEYS", "right")
    origins = f'allowed_origins = ["{PAGE}/"]\napi_keys_env = "BROWSER_KEYS"\n'
    return serve(NUMBERS + origins)


def options(live: Live, path: str, headers: dict[str, str]) -> Any:
    with live.http() as http:
        return http.options(path, headers=headers)


@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/v1/align/methods", "/v1/align/score"])
def test_a_preflight_is_answered_before_the_key_is_asked(open_to_page: Live, path: str) -> None:
    answer = options(open_to_page, path, PREFLIGHT)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "x-stainless-os" in answer.headers["access-control-allow-headers"]


def test_answers_and_errors_carry_the_headers(open_to_page: Live) -> None:
    for key, status in (("wrong", 401), ("right", 200)):
        headers = {"origin": PAGE, "authorization": f"Bearer {key}"}
        answer = open_to_page.post({"messages": USER}, headers=headers)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()


def test_other_origins_are_not_allowed(open_to_page: Live) -> None:
    answer = options(open_to_page, CHAT, {**PREFLIGHT, "origin": "https://evil.example"})
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers


def test_every_origin_may_be_allowed(serve: Serve) -> None:
    live = serve(NUMBERS + 'allowed_origins = ["*"]\n')
    answer = live.post({"messages": USER}, headers={"origin": "null"})
    assert answer.headers["access-control-allow-origin"] == "*"


def test_by_default_no_origin_is_allowed(numbers: Live) -> None:
    answer = numbers.post({"messages": USER}, headers={"origin": PAGE})
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", f"{CHAT}/", 200),
        ("GET", "/v1/models/", 200),
        ("GET", "/ready/", 200),
        ("GET", "/v1/", 404),
        ("GET", "/v1/nothing/", 404),
    ],
)
def test_a_slash_at_the_end_changes_nothing(
    numbers: Live, method: str, path: str, status: int
) -> None:
    with numbers.http() as http:
        body = {"messages": USER} if method == "POST" else None
        answer = http.request(method, numbers.root + path, json=body)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"


def test_the_page_is_also_at_two_slashes(numbers: Live) -> None:
    with numbers.http() as http:
        page = http.get(f"{numbers.root}//")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")


def test_whole_numbers_may_be_written_as_floats(numbers: Live) -> None:
    for align in (None, {"best_of_n": {"n": 2}}):
        answer = numbers.chat(align, max_tokens=4.0, seed=1.0, n=1.0)
        assert answer.status_code == 200, answer.text
    assert numbers.chat(max_tokens=4.5).status_code == 400


def test_temperature_0_with_several_candidates_is_mentioned(numbers: Live) -> None:
    answer = numbers.chat({"best_of_n": {"n": 2}}, temperature=0)
    assert "temperature 0 draws equal candidates" in answer.json()["align"]["reason"]


@pytest.mark.parametrize(
    ("path", "clause"),
    [
        ("/chat/completions", "use /v1/chat/completions: the base URL of a client ends in /v1"),
        ("/models", "use /v1/models"),
        ("/align/score", "use /v1/align/score"),
        ("/v1/v1/chat/completions", "use /v1/chat/completions: the base URL of a client has /v1"),
        ("/v1/chat/completion", "the nearest one is /v1/chat/completions"),
        ("/v1/modles", "the nearest one is /v1/models"),
    ],
)
def test_a_wrong_path_is_answered_with_the_route_that_was_meant(
    numbers: Live, path: str, clause: str
) -> None:
    with numbers.http() as client:
        answer = client.post(path, json={})
    assert answer.status_code == 404
    assert f"POST {path}: there is no such route; {clause}" in answer.json()["error"]["message"]


def test_a_path_like_no_other_is_a_plain_404(numbers: Live) -> None:
    with numbers.http() as client:
        for path in ("/nothing", "/api/tags", "/" + "x" * 4000):
            message = client.get(path).json()["error"]["message"]
            assert message.endswith("there is no such route.")
