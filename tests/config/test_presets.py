"""Presets: an `align` object, and fields of the body beside it."""

from __future__ import annotations

import pytest

from infer_align.config.presets import fill, split_presets
from infer_align.errors import ConfigError


def test_a_preset_without_a_body_is_its_align_object() -> None:
    align = {"best_of_n": {"n": 2}}
    assert split_presets({"a": align}) == ({"a": align}, {"a": {}})


def test_the_body_stands_beside_the_keys_of_align() -> None:
    table = {"a": {"best_of_n": {"n": 2}, "body": {"temperature": 0.2, "stop": ["x"]}}}
    aligns, bodies = split_presets(table)
    assert aligns == {"a": {"best_of_n": {"n": 2}}}
    assert bodies == {"a": {"temperature": 0.2, "stop": ["x"]}}


@pytest.mark.parametrize("field", ["model", "messages", "prompt", "align", "stream"])
def test_what_makes_a_request_cannot_be_preset(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"\[presets.a\] body.{field}: is set by each request"):
        split_presets({"a": {"body": {field: "x"}}})


def test_a_body_that_is_no_table_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[presets.a\] body: 0.5 is not a table"):
        split_presets({"a": {"body": 0.5}})


def test_a_default_fills_what_the_body_leaves_open() -> None:
    defaults = {"temperature": 0.2, "max_tokens": 5}
    assert fill({}, defaults) == defaults
    assert fill({"temperature": None}, defaults) == defaults, "null counts as not set"
    assert fill({"temperature": 0}, defaults) == {"temperature": 0, "max_tokens": 5}
    for name in ("max_tokens", "max_completion_tokens"):
        assert fill({name: 3}, defaults) == {name: 3, "temperature": 0.2}
    body = {"temperature": 1, "max_tokens": 1}
    assert fill(body, defaults) is body
