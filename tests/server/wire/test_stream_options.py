"""OpenAI's `stream` and `stream_options`."""

from __future__ import annotations

from typing import Any

import pytest

from infer_align.errors import InvalidRequest
from infer_align_server.wire.stream_options import StreamOptions, stream_options


@pytest.mark.parametrize("body", [{}, {"stream": None}, {"stream": False}])
def test_without_stream_there_are_no_options(body: dict[str, Any]) -> None:
    assert stream_options(body) is None
    assert stream_options({**body, "stream_options": None}) is None


@pytest.mark.parametrize("usage", [True, False])
def test_the_options_of_a_stream(usage: bool) -> None:
    body = {"stream": True, "stream_options": {"include_usage": usage}}
    assert stream_options(body) == StreamOptions(include_usage=usage)
    assert stream_options({"stream": True}) == StreamOptions()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream": {}}, "stream"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": 5}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        (
            {"stream": True, "stream_options": {"include_usage": "yes"}},
            "stream_options.include_usage",
        ),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        stream_options(body)
    assert refused.value.param == param
