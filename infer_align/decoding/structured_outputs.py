"""The fields of a body that constrain the answer: `response_format` and `structured_outputs`.

The first is OpenAI's, the second vLLM's. Both become one `Grammar`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import llguidance
from llguidance import LLMatcher

from infer_align.decoding.constraint import Grammar
from infer_align.errors import InvalidRequest, nearest, quote
from infer_align.types import Body

FIELDS = frozenset({"response_format", "structured_outputs"})
# The white space that `json.dumps` writes. Free white space lets a small model write it forever.
COMPACT: Mapping[str, Any] = MappingProxyType(
    {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
)

_SCHEMA_MAPS = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
)
_SCHEMAS = frozenset({"items", "prefixItems", "allOf", "anyOf", "oneOf", "additionalProperties"})
# Keywords that merge a schema with the properties that stand beside them.
_MERGING = frozenset({"$ref", "$dynamicRef", "anyOf", "oneOf", "dependentSchemas", "if"})
_OPTIONS = frozenset(
    {"disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"}
)
# llguidance knows the lengths of the months but not the leap years, and has a 61st second. Some
# readers refuse years below 1, and other fractions of a second.
_DAYS = (
    "(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
    "|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
)
_DATE = f"[1-9][0-9]{{3}}-{_DAYS}"
_TIME = r"[0-2][0-9]:[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-][0-2][0-9]:[0-5][0-9])"
_DATE_PATTERNS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
}
_BOOLEAN = {"type": ["boolean", "null"]}


@dataclass(frozen=True, slots=True)
class JsonStyle:
    """The choice among the JSON texts that a schema allows.

    Attributes:
        spacing: llguidance's options for white space.
        closes_objects: True to leave out properties that the schema does not list.
    """

    spacing: Mapping[str, Any]
    closes_objects: bool = True


COMPACT_JSON = JsonStyle(COMPACT)


def read_grammar(body: Body) -> Grammar | None:
    """Return the grammar that a body asks for; None if the answer is free.

    Raises:
        InvalidRequest: a field is malformed, or two constraints are set at once.
    """
    from_format = _read_response_format(body.get("response_format"))
    from_outputs = _read_structured_outputs(body.get("structured_outputs"))
    if from_format and from_outputs:
        raise InvalidRequest(
            f"structured_outputs: {from_format.param} is a constraint too; set only one of them.",
            param="structured_outputs",
        )
    return from_format or from_outputs


def field_schemas() -> dict[str, Any]:
    """Return the JSON schema of each field that `read_grammar` reads, by name."""
    described = {
        "type": "object",
        "required": ["name", "schema"],
        "properties": {
            "name": {"type": "string", "minLength": 1},
            "schema": {"type": "object"},
            "strict": _BOOLEAN,
        },
    }
    response_format = {
        "type": ["object", "null"],
        "required": ["type"],
        "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}},
        "if": {"properties": {"type": {"const": "json_schema"}}},
        "then": {"required": ["json_schema"], "properties": {"json_schema": described}},
    }
    text = {"type": "string", "minLength": 1}
    constraints = {
        "json": {"type": ["object", "string"]},
        "json_object": {"const": True},
        "regex": text,
        "choice": {"type": "array", "items": text, "minItems": 1},
        "grammar": text,
    }
    outputs = {
        "type": ["object", "null"],
        "properties": {
            **constraints,
            "disable_any_whitespace": _BOOLEAN,
            "disable_additional_properties": _BOOLEAN,
            "whitespace_pattern": {"type": ["string", "null"]},
        },
        "oneOf": [{"required": [name]} for name in constraints],
    }
    return {"response_format": response_format, "structured_outputs": outputs}


def json_grammar(schema: Mapping[str, Any], param: str, style: JsonStyle = COMPACT_JSON) -> Grammar:
    """Return the grammar of the JSON texts that a schema allows.

    Args:
        schema: the JSON schema.
        param: the field of the request that it comes from.
        style: the choice among these texts.

    Raises:
        InvalidRequest: the schema is nested too deeply.
    """
    return Grammar(LLMatcher.grammar_from_json_schema(json_schema_of(schema, param, style)), param)


def json_schema_of(schema: Mapping[str, Any], param: str, style: JsonStyle = COMPACT_JSON) -> str:
    """Return a JSON schema as llguidance reads it, with the style as its own keyword.

    Raises:
        InvalidRequest: the schema is nested too deeply.
    """
    try:
        narrowed = _with_real_dates(closed(schema) if style.closes_objects else schema)
        return json.dumps({"x-guidance": {**style.spacing}, **narrowed})
    except (RecursionError, ValueError) as error:
        raise InvalidRequest(
            f"{param}: cannot be read as a JSON schema: {error}; must be a JSON schema.",
            param=param,
        ) from None


def closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema with `additionalProperties: false` in objects that list properties.

    Every answer that fits the result fits the schema too. An object stays open where the schema
    says so, and all stay open where objects are merged, as by `allOf`: closed parts would exclude
    each other.
    """
    for part in _parts(schema):
        merges = "properties" in part and _MERGING & part.keys()
        if "allOf" in part or merges:
            return schema
    copied: Mapping[str, Any] = json.loads(json.dumps(schema))
    for part in _parts(copied):
        lists_properties = isinstance(part.get("properties"), dict)
        if lists_properties and not {"additionalProperties", "patternProperties"} & part.keys():
            part["additionalProperties"] = False
    return copied


def _with_real_dates(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema with patterns for dates and times that every reader accepts."""
    copied: Mapping[str, Any] = json.loads(json.dumps(schema))
    for part in _parts(copied):
        pattern = _DATE_PATTERNS.get(str(part.get("format")))
        if pattern:
            part.setdefault("pattern", pattern)
    return copied


def _parts(schema: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a schema and all schemas inside it."""
    stack: list[Any] = [schema]
    while stack:
        part = stack.pop()
        if not isinstance(part, dict):
            continue
        yield part
        for name, value in part.items():
            if name in _SCHEMA_MAPS and isinstance(value, dict):
                stack += value.values()
            elif name in _SCHEMAS:
                stack += value if isinstance(value, list) else [value]


def _read_response_format(value: Any) -> Grammar | None:
    if value is None:
        return None
    kind = _object(value, "response_format", "an object with a type").get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return json_grammar({"type": "object"}, "response_format")
    if kind == "json_schema":
        return _read_json_schema(value.get("json_schema"))
    raise InvalidRequest(
        f"response_format.type: {quote(kind)} is not allowed; "
        "must be text, json_object or json_schema.",
        param="response_format.type",
    )


def _read_json_schema(value: Any) -> Grammar:
    path = "response_format.json_schema"
    described = _object(value, path, "an object with a name and a schema")
    name = described.get("name")
    if not isinstance(name, str) or not name:
        raise _wrong(f"{path}.name", name, "a string that is not empty")
    if not isinstance(described.get("strict"), bool | None):
        raise _wrong(f"{path}.strict", described["strict"], "true or false")
    schema = _object(described.get("schema"), f"{path}.schema", "a JSON schema")
    return json_grammar(schema, f"{path}.schema")


def _read_structured_outputs(value: Any) -> Grammar | None:
    path = "structured_outputs"
    if value is None:
        return None
    fields = {**_object(value, path, "an object")}
    options = {name: fields.pop(name) for name in _OPTIONS & fields.keys()}
    constraints = {name: entry for name, entry in fields.items() if entry is not None}
    for name in constraints:
        if name not in _READERS:
            raise InvalidRequest(
                f"{path}.{name}: is not a constraint; {nearest(name, _READERS)}",
                param=f"{path}.{name}",
            )
    if len(constraints) != 1:
        names = ", ".join(sorted(constraints)) or "none"
        raise InvalidRequest(
            f"{path}: holds {names}; must hold exactly one of {', '.join(sorted(_READERS))}.",
            param=path,
        )
    ((name, entry),) = constraints.items()
    return _READERS[name](entry, f"{path}.{name}", _read_style(options))


def _read_style(options: Mapping[str, Any]) -> JsonStyle:
    path = "structured_outputs"
    for name in ("disable_any_whitespace", "disable_additional_properties"):
        if not isinstance(options.get(name), bool | None):
            raise _wrong(f"{path}.{name}", options[name], "true or false")
    pattern = options.get("whitespace_pattern")
    if not isinstance(pattern, str | None):
        raise _wrong(f"{path}.whitespace_pattern", pattern, "a regular expression")
    spacing = COMPACT
    if options.get("disable_any_whitespace") is False:
        spacing = {"whitespace_flexible": True}
    if pattern is not None:
        spacing = {"whitespace_pattern": pattern}
    closes_objects = options.get("disable_additional_properties") is not False
    return JsonStyle(spacing, closes_objects)


def _read_json(value: Any, param: str, style: JsonStyle) -> Grammar:
    schema = value
    if isinstance(value, str):
        try:
            schema = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(
                f"{param}: {quote(value)} is not JSON: {error}; must be a JSON schema.",
                param=param,
            ) from None
    return json_grammar(_object(schema, param, "a JSON schema"), param, style)


def _read_json_object(value: Any, param: str, style: JsonStyle) -> Grammar:
    if value is not True:
        raise _wrong(param, value, "true")
    return json_grammar({"type": "object"}, param, style)


def _read_regex(value: Any, param: str, _: JsonStyle) -> Grammar:
    return Grammar(LLMatcher.grammar_from_regex(_text(value, param)), param)


def _read_grammar_text(value: Any, param: str, _: JsonStyle) -> Grammar:
    text = _text(value, param)
    try:
        return Grammar(llguidance.grammar_from("grammar", text), param)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{param}: {error}; must be a grammar.", param=param) from None


def _read_choice(value: Any, param: str, _: JsonStyle) -> Grammar:
    valid = isinstance(value, list) and value
    if not valid or not all(isinstance(item, str) and item for item in value):
        raise _wrong(param, value, "a list of at least one string, none empty")
    return Grammar(llguidance.grammar_from("choice", json.dumps(value)), param)


_Reader = Callable[[Any, str, JsonStyle], Grammar]
_READERS: Mapping[str, _Reader] = {
    "json": _read_json,
    "json_object": _read_json_object,
    "regex": _read_regex,
    "choice": _read_choice,
    "grammar": _read_grammar_text,
}


def _object(value: Any, param: str, allowed: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(param, value, allowed)
    return value


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(param, value, "a string that is not empty")
    return value


def _wrong(param: str, value: object, allowed: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param}: {quote(value)} is not allowed; must be {allowed}.", param=param
    )
