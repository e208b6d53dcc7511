"""Errors of vLLM's OpenAI layer as errors of this project."""

from __future__ import annotations

import pytest

from infer_align.errors import AlignError, EngineFailed, InvalidRequest, Unavailable
from infer_align.vllm.interfaces import CandidateCall, error_from_json


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (400, InvalidRequest),
        (404, InvalidRequest),
        ("422", InvalidRequest),
        (499, InvalidRequest),
        (500, EngineFailed),
        (502, EngineFailed),
        (503, Unavailable),
    ],
)
def test_the_status_chooses_the_error(code: int | str, kind: type[AlignError]) -> None:
    error = error_from_json({"code": code, "message": "no such model", "param": "model"})
    assert type(error) is kind
    assert error.status == int(code)
    assert error.message == "no such model"


def test_a_refused_request_names_its_field() -> None:
    error = error_from_json({"code": 400, "message": "top_p is 7", "param": "top_p"})
    assert error.param == "top_p"
    assert error_from_json({"code": 400, "message": "no"}).param is None


def test_an_engine_that_is_not_ready_names_a_time_to_retry() -> None:
    assert error_from_json({"code": 503, "message": "loading"}).retry_after == 1


def test_calls_share_nothing() -> None:
    first = CandidateCall()
    second = CandidateCall()
    first.request_id = "a"
    assert second.request_id is None
    assert first.extra_args is not second.extra_args
