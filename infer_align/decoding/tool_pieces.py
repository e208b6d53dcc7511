"""Assigning the pieces of streamed tool calls to their calls.

Servers number the pieces in many ways. These rules read all of them:

    an empty id, type, name or role    is absent
    no index and no new id             continues the last call
    a new id at an index in use        is a new call
    an id that was used before         continues that call, unless the index is new
    a name after complete arguments,   is a new call, if the piece has arguments too
    without an id
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Fields that a piece may send empty, which says nothing.
_EMPTY_IS_ABSENT = frozenset({"id", "type", "name", "role"})


class ToolCallNumbers:
    """The numbers of the tool calls of one message, in the order in which they begin."""

    def __init__(self) -> None:
        self._ids: list[str | None] = []
        # The index of the server -> the number of its latest call.
        self._by_index: dict[int, int] = {}
        # The arguments of each call so far, in pieces.
        self._arguments: list[list[str]] = []

    def renumbered(self, pieces: list[Any]) -> list[Any]:
        """Return the pieces of one delta, each with the number of its call as its index."""
        return [self._renumber(piece) if isinstance(piece, Mapping) else piece for piece in pieces]

    def _renumber(self, piece: Mapping[str, Any]) -> dict[str, Any]:
        fields = cleaned(piece)
        call_id = fields.get("id")
        index = _number(fields.pop("index", None))
        function = fields.get("function")
        if isinstance(function, Mapping):
            fields["function"] = function = cleaned_function(function)
        number = self._number_of(call_id, index)
        if call_id is None and _is_whole(function) and self._is_complete(number):
            number = len(self._ids)
        if number == len(self._ids):
            self._ids.append(None)
            self._arguments.append([])
        self._ids[number] = call_id or self._ids[number]
        if index is not None:
            self._by_index[index] = number
        if isinstance(function, Mapping):
            self._arguments[number].append(str(function.get("arguments", "")))
        return {"index": number, **fields}

    def _is_complete(self, number: int) -> bool:
        """Return True if the arguments of a call so far are a JSON object."""
        if number >= len(self._arguments):
            return False
        try:
            return isinstance(json.loads("".join(self._arguments[number])), dict)
        except (ValueError, RecursionError):
            return False

    def _number_of(self, call_id: str | None, index: int | None) -> int:
        following = len(self._ids)
        if (
            index is not None
            and index in self._by_index
            and call_id in (None, self._ids[self._by_index[index]])
        ):
            return self._by_index[index]
        is_new_index = index is not None and index not in self._by_index
        if call_id is not None and call_id in self._ids and not is_new_index:
            return self._ids.index(call_id)
        if index is None:
            # Without a new id, the last call goes on.
            return max(0, following - 1) if call_id is None else following
        number = self._by_index.get(index, following)
        is_other_call = number < following and call_id and self._ids[number]
        return following if is_other_call else number


def cleaned(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields without those that are sent empty and say nothing."""
    present: dict[str, Any] = {}
    for name, value in fields.items():
        is_absent = value is None or (value == "" and name in _EMPTY_IS_ABSENT)
        if not is_absent:
            present[name] = value
    return present


def cleaned_function(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return the name and the arguments of a call; arguments that are an object become JSON."""
    fields = cleaned(function)
    arguments = fields.get("arguments")
    if isinstance(arguments, dict | list):
        fields["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return fields


def _is_whole(function: object) -> bool:
    """Return True for a piece that has both the name and arguments."""
    return isinstance(function, Mapping) and all(function.get(n) for n in ("name", "arguments"))


def _number(index: object) -> int | None:
    """Return the index of a piece; some servers send it as a string or a float."""
    if isinstance(index, str) and index.isdecimal():
        return int(index)
    if isinstance(index, bool) or not isinstance(index, int | float):
        return None
    return int(index) if float(index).is_integer() else None
