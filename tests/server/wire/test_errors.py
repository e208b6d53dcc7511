"""Errors have OpenAI's shape, a bounded size, and the headers that clients act on."""

from __future__ import annotations

import json

import pytest

from infer_align.errors import InvalidRequest, Unauthorized, Unavailable
from infer_align_server.wire.errors import MAX_TEXT, error_json, error_response


def test_an_error_has_the_four_fields() -> None:
    error = InvalidRequest("n: 0 is not allowed.", param="n", code="bad_n")
    assert error_json(error) == {
        "error": {
            "message": "n: 0 is not allowed.",
            "type": error.type,
            "param": "n",
            "code": "bad_n",
        }
    }


@pytest.mark.parametrize("length", [MAX_TEXT, MAX_TEXT + 1, 10 * MAX_TEXT])
def test_a_long_text_loses_its_middle(length: int) -> None:
    text = f"a{'x' * (length - 2)}z"
    fields = error_json(InvalidRequest(text, param=text))["error"]
    for name in ("message", "param"):
        assert len(fields[name]) <= MAX_TEXT + len(" ... ")
        assert fields[name][0] == "a"
        assert fields[name][-1] == "z"
        assert (fields[name] == text) == (length <= MAX_TEXT)


@pytest.mark.parametrize(("seconds", "header"), [(0.0, "1"), (0.2, "1"), (1.5, "2"), (60, "60")])
def test_retry_after_is_whole_seconds_and_at_least_one(seconds: float, header: str) -> None:
    response = error_response(Unavailable("busy", retry_after=seconds))
    assert response.status_code == 503
    assert response.headers["retry-after"] == header


def test_headers_that_do_not_apply_are_left_out() -> None:
    response = error_response(InvalidRequest("no"))
    assert "retry-after" not in response.headers
    assert "www-authenticate" not in response.headers
    assert json.loads(response.body)["error"]["param"] is None


def test_a_missing_key_names_the_scheme() -> None:
    assert error_response(Unauthorized("no key")).headers["www-authenticate"] == "Bearer"
