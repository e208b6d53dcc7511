"""Parse JSON objects into parameter dataclasses, with errors that name the field.

The request's `align` and the configuration file use this one parser. The default, the bounds and
the description of a field are written once, on the dataclass; JSON schemas and tables read them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from infer_align.config.read_if import add_conditions, refuse_unread
from infer_align.errors import (
    AlignError,
    ConfigError,
    InvalidRequest,
    WrongField,
    field_path,
    nearest,
    quote,
)

T = TypeVar("T")

# Adapters are slow to make. They are kept by class; `functools.cache` is not typed for classes.
_adapters: dict[type[Any], TypeAdapter[Any]] = {}

# The last part of pydantic's location of a key that is not allowed.
_KEY = "[key]"

# The types of pydantic's errors about values that have to be numbers, and texts that hold one.
_NUMBER_ERRORS = {"int_type", "float_type"}
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")

# A longer text is not repeated as a number.
_LONGEST_NUMBER = 40

# How pydantic ends its rule about the number of items. The value stands in the message anyway.
_ITEM_COUNT = re.compile(r" after validation, not (more|\d+)$")


def join(path: str, name: str) -> str:
    """Return the dotted path of `name` in `path`; `path` may be empty. An empty name is quoted."""
    return field_path(path, name) if path else field_path(name)


def parse(cls: type[T], value: object, path: str, error: type[AlignError] = InvalidRequest) -> T:
    """Parse a JSON object as the dataclass `cls`.

    Args:
        cls: the dataclass.
        value: the JSON object.
        path: where the object stands, such as "align.best_of_n"; "" if its keys are the body's own.
        error: the class of the error to raise.

    Raises:
        InvalidRequest: (or `error`) for the first wrong field, with its dotted path, its value and
            what is allowed.
    """
    if not isinstance(value, Mapping):
        # A request is JSON, the configuration is TOML.
        example = f"{{{signature(cls)}}}" if issubclass(error, ConfigError) else _example(cls)
        raise error(f"{path}: {quote(value)} is not an object; allowed: {example}.", param=path)
    passthrough = _passthrough_field(cls)
    names = _allowed_names(cls, passthrough, value)
    for key in value:
        if key not in names:
            raise error(
                f"{join(path, key)}: no such parameter; {nearest(str(key), names)}",
                param=join(path, key),
                code="unknown_field",
            )
    fields: dict[str, Any] = dict(value)
    if passthrough is not None:
        fields = _collect_options(fields, passthrough, _field_names(cls, passthrough))
    try:
        parsed = _validate(cls, fields)
    except ValidationError as invalid:
        if issubclass(error, InvalidRequest):
            # For JSON, 7.0 is an integer. TOML tells them apart.
            fields = _with_whole_numbers(fields, invalid)
        try:
            parsed = _validate(cls, fields)
        except ValidationError as refused:
            raise _first_error(cls, fields, refused, path, error) from None
    refuse_unread(value, parsed, path, error)
    return parsed


def _validate(cls: type[T], fields: Mapping[str, Any]) -> T:
    """Return the dataclass of the fields.

    Strict mode over JSON converts no types, and yet objects become dataclasses and arrays become
    tuples.
    """
    parsed: T = _adapter(cls).validate_json(json.dumps(fields, default=str), strict=True)
    return parsed


def _with_whole_numbers(fields: Mapping[str, Any], invalid: ValidationError) -> dict[str, Any]:
    """Return the fields with 7 in place of 7.0 wherever an integer is needed."""
    changed: dict[str, Any] = copy.deepcopy(dict(fields))
    for problem in invalid.errors(include_url=False):
        value = problem["input"]
        location = _location(problem, changed)
        if problem["type"] != "int_type" or not isinstance(value, float) or not location:
            continue
        if value.is_integer():
            parent: Any = changed
            for part in location[:-1]:
                parent = parent[int(part) if isinstance(parent, list) else part]
            last = location[-1]
            parent[int(last) if isinstance(parent, list) else last] = int(value)
    return changed


def _first_error(
    cls: type[Any],
    fields: Mapping[str, Any],
    invalid: ValidationError,
    path: str,
    error: type[AlignError],
) -> AlignError:
    """Return the error for the first field that pydantic refused."""
    errors = invalid.errors(include_url=False)
    first = _deepest(errors, fields)
    location = _location(first, fields)
    passthrough = _passthrough_field(cls)
    keys = location
    if passthrough is not None and location[:1] == [passthrough.name]:
        # The options stand beside the other fields, not in one of their own.
        keys = location[1:]
    where = functools.reduce(join, keys, path)
    if first["type"] == "missing":
        return error(f"{where}: is required{_description(cls, location)}.", param=where)
    if first["type"] == "unexpected_keyword_argument":
        names = [f.name for f in dataclasses.fields(_owner(cls, location))]
        message = f"{where}: no such parameter; {nearest(location[-1], names)}"
        return error(message, param=where, code="unknown_field")
    # A field that allows several types has an error for each.
    messages = [problem["msg"] for problem in errors if _location(problem, fields) == location]
    hint = _hint(cls, first, location)
    rules = f"is not allowed; {_rules(messages)}{hint}."
    cause = first.get("ctx", {}).get("error")
    if not where and isinstance(cause, WrongField):
        quoted = quote(fields.get(cause.field))
        return error(f"{cause.field}: {quoted} {rules}", param=cause.field)
    if not where:
        # The fields of the body do not fit together.
        return error(f"The body {rules}")
    subject = "the name " if first["loc"][-1:] == (_KEY,) else ""
    return error(f"{where}: {subject}{quote(first['input'])} {rules}", param=where)


def _hint(cls: type[Any], problem: ErrorDetails, location: Sequence[str]) -> str:
    """Return a clause on how to mend a value of the wrong type; "" if there is nothing to say."""
    value = problem["input"]
    is_text = isinstance(value, str) and len(value) <= _LONGEST_NUMBER
    if problem["type"] in _NUMBER_ERRORS and is_text and _NUMBER.fullmatch(value):
        return f"; write {value.strip()} without quotes"
    if problem["type"] == "int_type" and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if problem["type"] in {"dict_type", "dataclass_type"}:
        return _description(cls, location)
    if problem["type"] == "too_short":
        return _description(cls, location) + _field_example(cls, location)
    return ""


def json_schema(cls: type[Any]) -> dict[str, Any]:
    """Return the JSON schema of a parameter dataclass."""
    schema = _adapter(cls).json_schema()
    _close_patterns(schema)
    add_conditions(schema)
    passthrough = _passthrough_field(cls)
    if passthrough is not None and passthrough.metadata["rest"] is None:
        options = schema["properties"].pop(passthrough.name)
        schema["additionalProperties"] = options["additionalProperties"]
    return schema


def _close_patterns(schema: object) -> None:
    """Refuse the keys that match no pattern; pydantic refuses them, and its schema does not."""
    if isinstance(schema, dict):
        if "patternProperties" in schema:
            schema.setdefault("additionalProperties", False)
        for child in schema.values():
            _close_patterns(child)
    elif isinstance(schema, list):
        for child in schema:
            _close_patterns(child)


def signature(cls: type[Any]) -> str:
    """Return `name=default, ...` of a parameter dataclass, for help texts and tables."""
    parts = []
    for f in dataclasses.fields(cls):
        has_default = f.default is not dataclasses.MISSING
        parts.append(f"{f.name}={f.default!r}" if has_default else f.name)
    return ", ".join(parts)


def placeholder(parameter: dataclasses.Field[Any]) -> str:
    """Return the name of a parameter for people; options of any name have a placeholder."""
    return str(parameter.metadata.get("placeholder", parameter.name))


def _example(cls: type[Any]) -> str:
    """Return an object with each parameter and its default, as JSON."""
    parts = []
    for f in dataclasses.fields(cls):
        value = "..."
        if f.default is not dataclasses.MISSING:
            value = json.dumps(f.default, default=str)
        parts.append(f'"{placeholder(f)}": {value}')
    return f"{{{', '.join(parts)}}}"


def _description(cls: type[Any], location: Sequence[str]) -> str:
    """Return a clause with the description of a parameter; "" if it has none."""
    for f in dataclasses.fields(_owner(cls, location)):
        if location[-1] == f.name and "description" in f.metadata:
            return f": {f.metadata['description'].rstrip('.')}"
    return ""


def _field_example(cls: type[Any], location: Sequence[str]) -> str:
    """Return a clause with the example in the JSON schema of a parameter; "" if it has none."""
    for f in dataclasses.fields(_owner(cls, location)):
        examples = f.metadata.get("json_schema_extra", {}).get("examples")
        if location[-1] == f.name and examples:
            return f"; for example {json.dumps(examples[0])}"
    return ""


def _owner(cls: type[Any], location: Sequence[str]) -> type[Any]:
    """Return the dataclass in which the last part of a location is a field: `cls` or one in it."""
    owner = cls
    hint: Any = cls
    for part in location[:-1]:
        if dataclasses.is_dataclass(hint):
            hint = get_type_hints(hint).get(part)
        else:
            # The values of a dictionary, or the items of a list.
            hint = next((arg for arg in reversed(get_args(hint)) if arg is not Ellipsis), None)
        if get_origin(hint) in {Union, UnionType}:
            choices = [choice for choice in get_args(hint) if choice is not NoneType]
            hint = next(filter(dataclasses.is_dataclass, choices), choices[0])
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            owner = hint
    return owner


def _adapter(cls: type[Any]) -> TypeAdapter[Any]:
    if cls not in _adapters:
        _adapters[cls] = _make_adapter(cls)
    return _adapters[cls]


def _make_adapter(cls: type[Any]) -> TypeAdapter[Any]:
    # Only finite numbers are allowed: NaN and infinity pass every comparison that a bound makes.
    cls.__pydantic_config__ = ConfigDict(
        extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True
    )
    return TypeAdapter(cls)


def _passthrough_field(cls: type[Any]) -> dataclasses.Field[Any] | None:
    """Return the field that holds options under their own names, if any.

    Its metadata has the key "rest": a function that returns the names of all such options, or None
    if they may have any name.
    """
    for f in dataclasses.fields(cls):
        if "rest" in f.metadata:
            return f
    return None


def _field_names(cls: type[Any], passthrough: dataclasses.Field[Any] | None) -> set[str]:
    return {f.name for f in dataclasses.fields(cls) if f is not passthrough}


def _allowed_names(
    cls: type[Any], passthrough: dataclasses.Field[Any] | None, keys: Iterable[str]
) -> set[str]:
    names = _field_names(cls, passthrough)
    # The options of another program are listed only if some key needs them: that may be slow.
    if passthrough is not None and not names.issuperset(keys):
        list_options = passthrough.metadata["rest"]
        names |= set(keys if list_options is None else list_options())
    return names


def _collect_options(
    fields: Mapping[str, Any], passthrough: dataclasses.Field[Any], names: set[str]
) -> dict[str, Any]:
    """Move the keys that are no fields of the dataclass into its passthrough field."""
    collected: dict[str, Any] = {passthrough.name: {}}
    for key, value in fields.items():
        if key in names:
            collected[key] = value
        else:
            collected[passthrough.name][key] = value
    return collected


def _deepest(errors: Sequence[ErrorDetails], value: object) -> ErrorDetails:
    """Return the error of the first wrong field, from the type that its value fits best.

    A field that allows several types has errors for each. The one deepest in the value belongs to
    the type that was meant: a list with a wrong item is no failed object.
    """
    first = errors[0]
    start = _location(first, value)
    best = first
    for problem in errors:
        location = _location(problem, value)
        is_inside = location[: len(start)] == start
        if is_inside and len(location) > len(_location(best, value)):
            best = problem
    return best


def _location(problem: ErrorDetails, value: object) -> list[str]:
    """Return the parts of pydantic's location that are keys or indices of the value.

    The others are branches of a union, such as "int" or "function-after[...]".
    """
    parts = problem["loc"]
    location: list[str] = []
    here: Any = value
    for part in parts:
        is_key = isinstance(here, Mapping) and part in here
        is_index = isinstance(here, list | tuple) and isinstance(part, int)
        if is_key or is_index:
            location.append(str(part))
            here = here[part]
    if problem["type"] == "missing":
        location.append(str(parts[-1]))
    return location


def _rules(messages: Iterable[str]) -> str:
    """Turn pydantic's messages about one field into the clause that says what is allowed."""
    first, *further = dict.fromkeys(_rule(message) for message in messages)
    alternatives = [rule.removeprefix("allowed: ").removeprefix("must ") for rule in further]
    return ", or ".join([first, *alternatives])


def _rule(message: str) -> str:
    """Turn pydantic's message into the clause that says what is allowed."""
    subject, should, rule = message.partition(" should ")
    if not should:
        return f"must be {subject.removeprefix('Value error, ')}"
    rule = rule.replace("a valid array", "a list")
    rule = _ITEM_COUNT.sub("", rule)
    if rule.startswith("be '"):
        return f"allowed: {rule.removeprefix('be ')}"
    return f"must {rule}"
