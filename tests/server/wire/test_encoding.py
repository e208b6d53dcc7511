"""JSON is compact and valid: no NaN, no infinity."""

from __future__ import annotations

import json
import math

import pytest

from infer_align_server.wire.encoding import dumps, json_response, number


def test_json_is_compact_and_keeps_unicode() -> None:
    assert dumps({"a": [1, None], "ü": "猫"}) == '{"a":[1,null],"ü":"猫"}'.encode()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_represent_is_null_or_an_error(value: float) -> None:
    assert number(value) is None
    with pytest.raises(ValueError, match="JSON compliant"):
        dumps({"score": value})


@pytest.mark.parametrize("value", [0.0, -1.5, 1.7e308])
def test_finite_numbers_stay(value: float) -> None:
    assert json.loads(dumps(number(value))) == value


def test_a_response_has_its_status_and_headers() -> None:
    response = json_response({"ok": True}, 201, {"X-Note": "made"})
    assert (response.status_code, response.body) == (201, b'{"ok":true}')
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-note"] == "made"
