"""Parameters that are read in some modes only, such as `margin` of `align.select`.

The metadata of such a field says by "x-read-if" with which values of another field it is read:

    margin: float = field(
        default=0.25,
        metadata={"json_schema_extra": {"x-read-if": {"rule": ["lexicographic"]}}},
    )

A client that writes a margin beside another rule believes that it does something. So it is an
error, whatever the value. A request that names a key of `align` replaces that of its preset as a
whole, so what a preset wrote for another rule is no fault of the request.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from infer_align.errors import AlignError, field_path, quote

KEY = "x-read-if"
Field = dataclasses.Field[Any]


def unread(cls: type[Any], written: Mapping[str, Any]) -> dict[str, Field]:
    """Return the fields that are written and not read, each with the field of its mode.

    A null counts as not written.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    result: dict[str, Field] = {}
    for name, f in fields.items():
        for mode, values in _condition(f).items():
            current = written.get(mode, fields[mode].default)
            if written.get(name) is not None and current not in values:
                result[name] = fields[mode]
    return result


def refuse_unread(written: object, parsed: object, path: str, error: type[AlignError]) -> None:
    """Refuse the first parameter that its mode does not read, in an object or in one inside it.

    Args:
        written: The JSON that was parsed.
        parsed: What it was parsed to.
        path: Where it stands; "" if its keys are the body's own.
        error: The class of the error to raise.

    Raises:
        InvalidRequest: (or `error`) with what the mode reads, and the modes that read it.
    """
    if not dataclasses.is_dataclass(parsed) or not isinstance(written, Mapping):
        return
    for name, mode in unread(type(parsed), written).items():
        raise _unread_error(type(parsed), written, name, mode, path, error)
    for f in dataclasses.fields(parsed):
        # The keys of a field with "rest" stand beside the other fields.
        is_beside = "rest" in f.metadata
        inner = written if is_beside else written.get(f.name)
        where = path if is_beside else _join(path, f.name)
        for name, each, part in _entries(inner, getattr(parsed, f.name)):
            refuse_unread(each, part, _join(where, name), error)


def _unread_error(
    cls: type[Any],
    written: Mapping[str, Any],
    name: str,
    mode: Field,
    path: str,
    error: type[AlignError],
) -> AlignError:
    """Return the error for one parameter that is not read."""
    current = written.get(mode.name, mode.default)
    (readers,) = (_condition(f)[mode.name] for f in dataclasses.fields(cls) if f.name == name)
    names = [f.name for f in dataclasses.fields(cls) if f is not mode and "rest" not in f.metadata]
    hidden = unread(cls, {**dict.fromkeys(names, True), mode.name: current})
    allowed = ", ".join(each for each in names if each not in hidden) or "nothing"
    where = _join(path, name)
    return error(
        f"{where}: {quote(written[name])} is not read if {mode.name} is {quote(current)}; allowed "
        f"beside it: {allowed}. Leave {name} out, or set {_join(path, mode.name)} to "
        f"{' or '.join(quote(value) for value in readers)}.",
        param=where,
    )


def _entries(written: object, parsed: object) -> Iterator[tuple[str, Any, Any]]:
    """Yield the entries of an object or a list, each with its name or number."""
    if isinstance(written, Mapping) and isinstance(parsed, Mapping):
        for key, part in parsed.items():
            yield key, written.get(key), part
    elif isinstance(written, Sequence) and isinstance(parsed, list | tuple):
        for i, part in enumerate(parsed):
            yield str(i), written[i], part


def add_conditions(schema: object) -> None:
    """Write the conditions into a JSON schema: a field that the mode does not read is null."""
    if isinstance(schema, list):
        for child in schema:
            add_conditions(child)
    if not isinstance(schema, dict):
        return
    for child in list(schema.values()):
        add_conditions(child)
    properties = schema.get("properties", {})
    for name, field in properties.items():
        for mode, values in field.get(KEY, {}).items():
            other: dict[str, Any] = {"properties": {mode: {"not": {"enum": values}}}}
            if properties[mode].get("default") in values:
                # Without its field, the mode reads this one.
                other["required"] = [mode]
            is_null = {"properties": {name: {"type": "null"}}}
            schema.setdefault("allOf", []).append({"if": other, "then": is_null})


def _condition(f: Field) -> Mapping[str, Sequence[Any]]:
    extra = f.metadata.get("json_schema_extra", {})
    condition: Mapping[str, Sequence[Any]] = extra.get(KEY, {})
    return condition


def _join(path: str, name: str) -> str:
    return field_path(path, name) if path else field_path(name)
