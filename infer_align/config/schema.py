"""One parser for both scopes, the request's `align` and the configuration: dataclasses in, named errors out.

A field's default, bounds and description stand once, on the dataclass; JSON schemas and tables are read from there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from infer_align.errors import AlignError, InvalidRequest, nearest, shown

T = TypeVar("T")


_adapters: dict[type[Any], TypeAdapter[Any]] = {}


def _adapter(cls: type[Any]) -> TypeAdapter[Any]:
    if cls in _adapters:
        return _adapters[cls]
    # Finite numbers only: NaN and infinity pass every comparison that a bound makes.
    cls.__pydantic_config__ = ConfigDict(
        extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True
    )
    _adapters[cls] = TypeAdapter(cls)
    return _adapters[cls]


def parse(cls: type[T], value: object, path: str, error: type[AlignError] = InvalidRequest) -> T:
    """`value`, a JSON object, as the dataclass `cls`; `path` is where it stands, such as "align.best_of_n".

    Raises:
        InvalidRequest: (or `error`) for the first wrong field, with its dotted path, its value and what is allowed.
    """
    if not isinstance(value, Mapping):
        raise error(
            f"{path}: {shown(value)} is not an object; allowed: {{{_signature(cls)}}}.", param=path
        )
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    rest = next(
        (f for f in fields if "rest" in f.metadata), None
    )  # holds the options of something else, by their own names
    own = {f.name for f in fields if f is not rest}
    known = own if rest is None or own >= value.keys() else own | rest.metadata["rest"]()
    for key in value:
        if key not in known:
            raise error(
                f"{path}.{key}: no such parameter; {nearest(str(key), known)}",
                param=f"{path}.{key}",
                code="unknown_field",
            )
    if rest:
        options = {key: option for key, option in value.items() if key not in own}
        value = {**{key: option for key, option in value.items() if key in own}, rest.name: options}
    try:
        # Through JSON: there strict means no conversions at all, and yet objects become dataclasses and arrays tuples.
        parsed: T = _adapter(cls).validate_json(json.dumps(value, default=str), strict=True)
        return parsed
    except ValidationError as invalid:
        first = invalid.errors(include_url=False)[0]
        place = ".".join([path, *(str(part) for part in first["loc"] if _is_key(part))])
        raise error(
            f"{place}: {shown(first['input'])} is not allowed; {_rule(first['msg'])}.", param=place
        ) from None


def json_schema(cls: type[Any]) -> dict[str, Any]:
    """The JSON schema of a parameter dataclass."""
    return _adapter(cls).json_schema()


def signature(cls: type[Any]) -> str:
    """`name=default, ...` of a parameter dataclass, for help and tables."""
    return _signature(cls)


def _signature(cls: type[Any]) -> str:
    parts = []
    for f in dataclasses.fields(cls):
        default = "" if f.default is dataclasses.MISSING else f"={f.default!r}"
        parts.append(f"{f.name}{default}")
    return ", ".join(parts)


def _is_key(part: object) -> bool:
    # pydantic adds the branch of a union ("int", "function-after[...]") to the location: not a place in the body.
    return isinstance(part, int) or str(part) not in {
        "int",
        "float",
        "str",
        "bool",
        "none",
        "constrained-int",
        "constrained-float",
    }


def _rule(message: str) -> str:
    what, should, rule = message.partition(" should ")
    if not should:
        return f"must be {what.removeprefix('Value error, ')}"
    return f"allowed: {rule.removeprefix('be ')}" if rule.startswith("be '") else f"must {rule}"
