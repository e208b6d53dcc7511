"""Tests of the sampling parameters; `tests/engines/test_request_fields.py` tests every field."""

from __future__ import annotations

from typing import Any

import pytest

from infer_align.decoding.params import Range, SamplingParams, field_schemas
from infer_align.errors import InvalidRequest


@pytest.mark.parametrize(
    ("allowed", "accepted", "refused", "words"),
    [
        (Range(0.0, 2.0), [0, 2, 0.5], [-0.1, 2.1, True, "1", None, float("nan")], "a number from"),
        (Range(0.0, 1.0, above=True), [1, 0.01], [0, 0.0, 1.5], "over 0.0 and at most 1.0"),
        (Range(1, 9, integer=True), [1, 9], [0, 10, 1.0, True], "an integer from 1 to 9"),
    ],
)
def test_a_range_accepts_its_values_and_names_them(
    allowed: Range, accepted: list[Any], refused: list[Any], words: str
) -> None:
    for value in accepted:
        assert allowed.check("field", value) == value
    for value in refused:
        with pytest.raises(InvalidRequest, match=words) as error:
            allowed.check("field", value)
        assert error.value.param == "field"


def test_defaults_are_those_of_openai() -> None:
    params = SamplingParams.from_body({"messages": []}, "chat")
    assert params == SamplingParams()
    assert (params.temperature, params.top_p, params.max_tokens) == (1.0, 1.0, None)
    assert SamplingParams.from_body({"prompt": "x"}, "completion").max_tokens == 16


def test_the_body_overrides_the_defaults_of_the_model() -> None:
    defaults = {"temperature": 0.6, "top_k": 40}
    params = SamplingParams.from_body({"temperature": 0, "top_k": None}, "chat", defaults)
    assert (params.temperature, params.top_k) == (0, 40)


def test_the_newer_name_of_the_maximum_comes_first() -> None:
    params = SamplingParams.from_body({"max_tokens": 9, "max_completion_tokens": 3}, "chat")
    assert params.max_tokens == 3


@pytest.mark.parametrize(
    ("body", "kind", "limit"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "chat", "max_tokens, which is 4"),
        (
            {"min_tokens": 5, "max_tokens": 9, "max_completion_tokens": 4},
            "chat",
            "max_completion_tokens, which is 4",
        ),
        ({"prompt": "x", "min_tokens": 17}, "completion", "max_tokens, which is 16"),
    ],
)
def test_more_tokens_at_least_than_at_most_are_refused(body: Any, kind: Any, limit: str) -> None:
    with pytest.raises(InvalidRequest, match=f"min_tokens: .* is over {limit}") as error:
        SamplingParams.from_body(body, kind)
    assert error.value.param == "min_tokens"


def test_as_many_tokens_at_least_as_at_most_are_allowed() -> None:
    assert SamplingParams.from_body({"min_tokens": 5, "max_tokens": 5}, "chat").min_tokens == 5
    assert SamplingParams.from_body({"min_tokens": 500}, "chat").min_tokens == 500
    # The least number may be the model's own, which a request need not know.
    params = SamplingParams.from_body({"max_tokens": 4}, "chat", {"min_tokens": 9})
    assert (params.min_tokens, params.max_tokens) == (9, 4)


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams.from_body({"stop": "x"}, "chat").stop == ("x",)
    assert SamplingParams.from_body({"stop": ["x", "y"]}, "chat").stop == ("x", "y")


def test_logprobs_have_two_forms() -> None:
    assert SamplingParams.from_body({"logprobs": True}, "chat").logprobs == 0
    assert SamplingParams.from_body({"logprobs": True, "top_logprobs": 5}, "chat").logprobs == 5
    assert SamplingParams.from_body({"prompt": "x", "logprobs": 5}, "completion").logprobs == 5
    with pytest.raises(InvalidRequest, match="set logprobs to true"):
        SamplingParams.from_body({"top_logprobs": 5}, "chat")


def test_schemas_are_sorted_by_name() -> None:
    for kind in ("chat", "completion"):
        names = list(field_schemas(kind))
        assert names == sorted(names)


def test_a_wrong_bias_is_named_by_its_token() -> None:
    assert SamplingParams.from_body({"logit_bias": {"5": -100, "07": 1.5}}, "chat").logit_bias == {
        5: -100,
        7: 1.5,
    }
    with pytest.raises(InvalidRequest, match=r"logit_bias.5: 101 is not allowed") as error:
        SamplingParams.from_body({"logit_bias": {"4": 1, "5": 101}}, "chat")
    assert error.value.param == "logit_bias.5"
    for key in ("x", "-1", "1.0", " 1", "٣", "²"):
        with pytest.raises(InvalidRequest, match="is not a token id") as error:
            SamplingParams.from_body({"logit_bias": {key: 1}}, "chat")
        assert error.value.param == "logit_bias"
