"""One parser for both scopes: strict, finite, and every complaint names its place."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from infer_align.config.schema import json_schema, parse, signature
from infer_align.errors import ConfigError, InvalidRequest


@dataclass(frozen=True, slots=True)
class Inner:
    word: str = "x"


@dataclass(frozen=True, slots=True)
class Knobs:
    n: int = field(default=8, metadata={"ge": 1, "description": "how many"})
    weight: float = field(default=0.5, metadata={"ge": 0, "description": "how much"})
    kind: Literal["a", "b"] = field(default="a", metadata={"description": "which"})
    flag: bool = field(default=False, metadata={"description": "whether"})
    limit: float | None = field(default=None, metadata={"gt": 0, "description": "at most"})
    names: tuple[str, ...] = field(default=(), metadata={"description": "words"})
    inner: tuple[Inner, ...] = field(default=(), metadata={"description": "nested"})
    weights: dict[str, float] = field(default_factory=dict, metadata={"description": "named"})


def test_defaults_and_values() -> None:
    assert parse(Knobs, {}, "k") == Knobs()
    fields = {
        "n": 2,
        "weight": 1,
        "kind": "b",
        "flag": True,
        "limit": 3,
        "names": ["x"],
        "inner": [{"word": "y"}],
        "weights": {"a": 1},
    }
    assert parse(Knobs, fields, "k") == Knobs(
        2, 1.0, "b", True, 3.0, ("x",), (Inner("y"),), {"a": 1.0}
    )


WRONG: list[tuple[Any, str]] = [
    ({"n": 0}, "k.n"),
    ({"n": "8"}, "k.n"),
    ({"n": 8.5}, "k.n"),
    ({"n": True}, "k.n"),
    ({"n": None}, "k.n"),
    ({"weight": math.nan}, "k.weight"),
    ({"weight": math.inf}, "k.weight"),
    ({"weight": -1}, "k.weight"),
    ({"weight": 10**400}, "k.weight"),
    ({"weight": "1"}, "k.weight"),
    ({"kind": "c"}, "k.kind"),
    ({"flag": 1}, "k.flag"),
    ({"limit": 0}, "k.limit"),
    ({"limit": "3"}, "k.limit"),
    ({"names": "x"}, "k.names"),
    ({"names": [1]}, "k.names.0"),
    ({"inner": [{"word": 5}]}, "k.inner.0.word"),
    ({"inner": [{"wrod": "x"}]}, "k.inner.0.wrod"),
    ({"weights": {"a": "x"}}, "k.weights.a"),
    ({"m": 1}, "k.m"),
    ([], "k"),
    (None, "k"),
    ("n=8", "k"),
]


def test_a_request_may_write_an_integer_as_json_allows_it() -> None:
    assert parse(Knobs, {"n": 8.0, "limit": 3.0}, "k") == parse(Knobs, {"n": 8, "limit": 3}, "k")
    with pytest.raises(InvalidRequest, match=r"k\.limit: 0\.0 is not allowed"):
        parse(Knobs, {"limit": 0.0}, "k")
    # TOML tells an integer from a float.
    with pytest.raises(ConfigError, match=r"k\.n: 8\.0 is not allowed; .* write 8\."):
        parse(Knobs, {"n": 8.0}, "k", ConfigError)


@pytest.mark.parametrize(("value", "param"), WRONG)
@pytest.mark.parametrize("error", [InvalidRequest, ConfigError])
def test_what_is_wrong_is_named(value: Any, param: str, error: Any) -> None:
    with pytest.raises(error) as caught:
        parse(Knobs, value, "k", error)
    assert caught.value.param == param
    assert caught.value.message.startswith(f"{param}: ")
    assert caught.value.message.endswith((".", "?"))


@pytest.mark.parametrize(
    ("value", "fix"),
    [
        ({"n": "8"}, "must be a valid integer; write 8 without quotes."),
        ({"n": "eight"}, "must be a valid integer."),
        ({"n": 8.5}, "must be a valid integer."),
        ({"weight": "-1.5e3"}, "must be a valid number; write -1.5e3 without quotes."),
        ({"weights": {"a": "2"}}, "must be a valid number; write 2 without quotes."),
        ({"weights": 2}, "must be an object: named."),
        ({"weights": ["a"]}, "must be an object: named."),
        ({"names": "x"}, "must be a list."),
    ],
)
def test_a_value_of_the_wrong_type_has_its_fix(value: Any, fix: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(Knobs, value, "k")
    assert caught.value.message.endswith(fix)


@dataclass(frozen=True, slots=True)
class Filled:
    weights: dict[str, float] = field(
        default_factory=lambda: {"a": 1.0},
        metadata={
            "min_length": 1,
            "max_length": 2,
            "description": "{name: weight}.",
            "json_schema_extra": {"examples": [{"brief": 1.0}]},
        },
    )
    words: tuple[str, ...] = field(
        default=("a",), metadata={"min_length": 1, "description": "Words to find."}
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"weights": {}},
            "k.weights: {} is not allowed; must have at least 1 item: {name: weight}; for example "
            '{"brief": 1.0}.',
        ),
        ({"words": []}, "k.words: [] is not allowed; must have at least 1 item: Words to find."),
    ],
)
def test_an_empty_value_has_its_meaning_and_an_example(value: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(Filled, value, "k")
    assert caught.value.message == message


def test_too_many_items_have_their_limit() -> None:
    with pytest.raises(InvalidRequest, match=r"must have at most 2 items\.$"):
        parse(Filled, {"weights": {"a": 1, "b": 2, "c": 3}}, "k")


def test_unknown_names_the_nearest() -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'weight'") as caught:
        parse(Knobs, {"wieght": 1}, "k")
    assert caught.value.code == "unknown_field"


def test_json_schema_and_signature_say_what_the_dataclass_says() -> None:
    schema = json_schema(Knobs)
    assert schema["properties"]["n"] == {
        "default": 8,
        "description": "how many",
        "minimum": 1,
        "title": "N",
        "type": "integer",
    }
    assert schema["additionalProperties"] is False
    assert signature(Knobs).startswith("n=8, weight=0.5, kind='a'")
    assert "MISSING" not in signature(Knobs)
    assert "<" not in signature(Knobs), "a factory is no default to show"


@dataclass(frozen=True)
class Options:
    """A dataclass whose other keys have any name."""

    by_name: dict[str, Inner] = field(
        default_factory=dict, metadata={"rest": None, "placeholder": "<name>"}
    )
    flag: bool = False


def test_options_of_any_name_stand_beside_the_fields() -> None:
    parsed = parse(Options, {"a": {"word": "x"}, "by_name": {"word": "y"}, "flag": True}, "k")
    assert {name: inner.word for name, inner in parsed.by_name.items()} == {
        "a": "x",
        "by_name": "y",
    }
    assert parsed.flag
    schema = json_schema(Options)
    assert list(schema["properties"]) == ["flag"]
    assert schema["additionalProperties"] == {"$ref": "#/$defs/Inner"}
    with pytest.raises(InvalidRequest, match=r'allowed: \{"<name>": \.\.\., "flag": false\}'):
        parse(Options, 5, "k")
    with pytest.raises(
        InvalidRequest, match=r"^k\.a\.wrod: no such parameter; did you mean 'word'"
    ):
        parse(Options, {"a": {"wrod": "x"}}, "k")


@dataclass(frozen=True, slots=True)
class Branches:
    names: dict[str, float] | tuple[str, ...] | None = field(
        default=None, metadata={"description": "{name: weight}, or names."}
    )
    weights: dict[Annotated[str, Field(pattern="^[a-z]+$")], float | Inner] = field(
        default_factory=dict, metadata={"description": "named"}
    )


@pytest.mark.parametrize(
    ("value", "param", "rule"),
    [
        ({"names": 5}, "k.names", "must be an object, or be a list: {name: weight}, or names."),
        ({"names": ["a", 1]}, "k.names.1", "1 is not allowed; must be a valid string."),
        ({"names": {"a": "x"}}, "k.names.a", "'x' is not allowed; must be a valid number."),
        # Keys that are called like a branch of a union.
        ({"names": {"int": "x"}}, "k.names.int", "'x' is not allowed; must be a valid number."),
        ({"weights": {"none": []}}, "k.weights.none", "must be a valid number, or be an object."),
        ({"weights": {"a": {"word": 5}}}, "k.weights.a.word", "must be a valid string."),
        ({"weights": {"a": {"wrod": ""}}}, "k.weights.a.wrod", "did you mean 'word'?"),
        ({"weights": {"A": 1}}, "k.weights.A", "the name 'A' is not allowed; must match pattern"),
    ],
)
def test_a_field_of_several_types_is_named_without_them(value: Any, param: str, rule: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(Branches, value, "k")
    assert caught.value.param == param
    assert caught.value.message.startswith(f"{param}: ")
    assert rule in caught.value.message


@dataclass(frozen=True, slots=True)
class Checked:
    low: int = 0
    high: int = 1

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError("low at most high")


def test_fields_that_do_not_fit_together_are_named_by_their_object() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(Checked, {"low": 2}, "k")
    assert caught.value.param == "k"
    assert caught.value.message == "k: {'low': 2} is not allowed; must be low at most high."
    with pytest.raises(InvalidRequest) as caught:
        parse(Checked, {"low": 2}, "")
    assert caught.value.param is None
    assert caught.value.message == "The body is not allowed; must be low at most high."
