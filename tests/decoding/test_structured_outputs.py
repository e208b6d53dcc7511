"""Tests of the fields that ask for structured outputs: their values, and what they become."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher

from infer_align.decoding.structured_outputs import closed, field_schemas, read_grammar
from infer_align.errors import InvalidRequest

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def described(**fields: Any) -> dict[str, Any]:
    json_schema = {"name": "x", "schema": SCHEMA, **fields}
    return {"response_format": {"type": "json_schema", "json_schema": json_schema}}


def outputs(**fields: Any) -> dict[str, Any]:
    return {"structured_outputs": fields}


ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("response_format", {"response_format": {"type": "json_object"}}),
    ("response_format.json_schema.schema", described()),
    ("response_format.json_schema.schema", described(strict=True, description="words")),
    ("response_format.json_schema.schema", described(strict=None)),
    ("structured_outputs.json", outputs(json=SCHEMA)),
    ("structured_outputs.json", outputs(json=json.dumps(SCHEMA))),
    ("structured_outputs.json", outputs(json=SCHEMA, regex=None)),
    ("structured_outputs.json_object", outputs(json_object=True)),
    ("structured_outputs.regex", outputs(regex="a+")),
    ("structured_outputs.choice", outputs(choice=["a", 'b"\\', "é\U0001f600\n"])),
    ("structured_outputs.grammar", outputs(grammar='root ::= "a" | "b"')),
    ("structured_outputs.grammar", outputs(grammar='start: "a" | "b"')),
    ("structured_outputs.json", outputs(json=SCHEMA, whitespace_pattern=r"[ \n]?")),
]


@pytest.mark.parametrize(("param", "body"), ACCEPTED)
def test_a_constraint_becomes_a_grammar(param: str, body: dict[str, Any]) -> None:
    grammar = read_grammar(body)
    assert grammar is not None
    assert grammar.param == param
    assert LLMatcher.validate_grammar(grammar.text) == ""


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"response_format": None, "structured_outputs": None},
        {"response_format": {"type": "text"}},
    ],
)
def test_a_free_answer_has_no_grammar(body: dict[str, Any]) -> None:
    assert read_grammar(body) is None


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("response_format", {"response_format": "json"}),
    ("response_format.type", {"response_format": {}}),
    ("response_format.type", {"response_format": {"type": "xml"}}),
    ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
    ("response_format.json_schema.name", described(name=None)),
    ("response_format.json_schema.name", described(name="")),
    ("response_format.json_schema.schema", described(schema=None)),
    ("response_format.json_schema.schema", described(schema="{}")),
    ("response_format.json_schema.strict", described(strict="yes")),
    ("structured_outputs", {"structured_outputs": "a+"}),
    ("structured_outputs", outputs()),
    ("structured_outputs", outputs(disable_any_whitespace=True)),
    ("structured_outputs", outputs(regex="a", choice=["a"])),
    ("structured_outputs", {**outputs(regex="a"), "response_format": {"type": "json_object"}}),
    ("structured_outputs.regexp", outputs(regexp="a")),
    ("structured_outputs.regex", outputs(regex=5)),
    ("structured_outputs.regex", outputs(regex="")),
    ("structured_outputs.choice", outputs(choice=[])),
    ("structured_outputs.choice", outputs(choice=["a", ""])),
    ("structured_outputs.choice", outputs(choice="ab")),
    ("structured_outputs.grammar", outputs(grammar=["a"])),
    ("structured_outputs.grammar", outputs(grammar="root ::= (")),
    ("structured_outputs.json", outputs(json="{")),
    ("structured_outputs.json", outputs(json="5")),
    ("structured_outputs.json", outputs(json=[1])),
    ("structured_outputs.json_object", outputs(json_object=False)),
    ("structured_outputs.disable_any_whitespace", outputs(json={}, disable_any_whitespace=1)),
    ("structured_outputs.whitespace_pattern", outputs(json={}, whitespace_pattern=1)),
]


@pytest.mark.parametrize(("param", "body"), REFUSED)
def test_a_malformed_constraint_is_refused_by_name(param: str, body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_grammar(body)
    assert refused.value.param == param
    assert refused.value.message.startswith(f"{param}:")


def test_a_schema_that_is_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(InvalidRequest, match=r"structured_outputs\.json"):
        read_grammar(outputs(json=schema))
    # Python frees a deep structure level by level.
    while schema:
        schema = schema.pop("items", {})


@pytest.mark.parametrize(("param", "body"), ACCEPTED)
def test_the_described_fields_accept_what_is_read(param: str, body: dict[str, Any]) -> None:
    schemas = field_schemas()
    for name, value in body.items():
        if value.get("regex", "") is not None:
            jsonschema.validate(value, schemas[name])
    assert param.partition(".")[0] in schemas


OPEN: list[dict[str, Any]] = [
    {"properties": {"a": {}}, "additionalProperties": True},
    {"properties": {"a": {}}, "patternProperties": {"^b": {}}},
    {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
    {"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}, {"required": ["c"]}]},
    {"properties": {"a": {}}, "$ref": "#/$defs/b", "$defs": {"b": {"properties": {"c": {}}}}},
    {"type": "object"},
]


@pytest.mark.parametrize("schema", OPEN)
def test_objects_that_are_merged_or_declared_open_stay_open(schema: dict[str, Any]) -> None:
    assert closed(schema) == schema


def test_objects_that_list_properties_are_closed_everywhere() -> None:
    leaf = {"properties": {"a": {}}}
    shut = {"properties": {"a": {}}, "additionalProperties": False}
    schema = {
        "properties": {
            "properties": leaf,
            "items": {"type": "array", "items": leaf, "prefixItems": [leaf]},
            "either": {"anyOf": [leaf, {"type": "null"}]},
            "named": {"$ref": "#/$defs/leaf"},
            "example": {"const": {"properties": {"a": {}}}},
        },
        "$defs": {"leaf": leaf},
    }
    result = closed(schema)
    assert result["additionalProperties"] is False
    assert result["$defs"]["leaf"] == shut
    parts = result["properties"]
    assert parts["properties"] == shut
    assert parts["items"]["items"] == shut
    assert parts["items"]["prefixItems"] == [shut]
    assert parts["either"]["anyOf"][0] == shut
    assert parts["example"] == {"const": leaf}, "a value is no schema"
    assert "additionalProperties" not in schema, "the argument stays unchanged"
