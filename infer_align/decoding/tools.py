"""The tools of a chat request: `tools`, `tool_choice` and `parallel_tool_calls`, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infer_align.errors import InvalidRequest, nearest, quote
from infer_align.types import Body

FIELDS = frozenset({"tools", "tool_choice", "parallel_tool_calls"})
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}
NAME = r"^[a-zA-Z0-9_.-]{1,64}$"
_BOOLEAN = {"type": ["boolean", "null"]}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: its name.
        parameters: the JSON schema of its arguments.
        described: the tool as the client sent it.
        param: where its schema stands in the request.
        is_strict: True if a schema that cannot be followed is an error in any case.
    """

    name: str
    parameters: Mapping[str, Any]
    described: Mapping[str, Any]
    param: str
    is_strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """The tools of one request.

    Attributes:
        tools: those that the model may call.
        described: all tools as the client sent them, for the prompt.
        is_required: True if the answer must be a call.
        is_named: True if `tool_choice` names the one tool to call.
        parallel: True if the answer may hold several calls.
    """

    tools: tuple[Tool, ...]
    described: tuple[Mapping[str, Any], ...]
    is_required: bool = False
    is_named: bool = False
    parallel: bool = True


def read_tools(body: Body) -> ToolRequest | None:
    """Return the tools of a chat body; None if the model shall call none.

    Raises:
        InvalidRequest: a field is malformed, or `tool_choice` needs a tool that is missing.
    """
    parallel = body.get("parallel_tool_calls")
    if not isinstance(parallel, bool | None):
        raise _wrong("parallel_tool_calls", parallel, "true or false")
    tools = _read_all(body.get("tools"))
    described = tuple(tool.described for tool in tools.values())
    choice = body.get("tool_choice")
    if isinstance(choice, Mapping):
        tool = _named_tool(choice, tools)
        return ToolRequest((tool,), described, is_required=True, is_named=True, parallel=False)
    if choice not in (None, "none", "auto", "required"):
        allowed = "none, auto, required, or an object that names a tool"
        raise _wrong("tool_choice", choice, allowed)
    if choice == "required" and not tools:
        raise InvalidRequest(
            "tool_choice: 'required' needs tools; set tools, or leave tool_choice out.",
            param="tool_choice",
        )
    if not tools or choice == "none":
        return None
    is_required = choice == "required"
    callable_tools = tuple(tools.values())
    return ToolRequest(
        callable_tools, described, is_required=is_required, parallel=parallel is not False
    )


def field_schemas() -> dict[str, Any]:
    """Return the JSON schema of each field that `read_tools` reads, by name.

    `tool_choice` has none: its values depend on the tools.
    """
    function = {
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": {"type": "string", "pattern": NAME},
            "description": {"type": ["string", "null"]},
            "parameters": {"type": ["object", "null"]},
            "strict": _BOOLEAN,
        },
    }
    tool = {
        "type": "object",
        "required": ["type", "function"],
        "properties": {"type": {"const": "function"}, "function": function},
    }
    return {"tools": {"type": ["array", "null"], "items": tool}, "parallel_tool_calls": _BOOLEAN}


def _read_all(entries: Any) -> dict[str, Tool]:
    """Return the tools by name."""
    if not isinstance(entries, list | None):
        raise _wrong("tools", entries, "a list of tools")
    tools: dict[str, Tool] = {}
    for i, entry in enumerate(entries or ()):
        tool = _read_tool(entry, f"tools[{i}]")
        if tool.name in tools:
            path = f"tools[{i}].function.name"
            raise InvalidRequest(f"{path}: {tool.name!r} is there twice; rename one.", param=path)
        tools[tool.name] = tool
    return tools


def _read_tool(entry: Any, path: str) -> Tool:
    if not isinstance(entry, Mapping):
        raise _wrong(path, entry, 'an object such as {"type": "function", "function": {...}}')
    if entry.get("type") != "function":
        raise _wrong(f"{path}.type", entry.get("type"), "function")
    function = entry.get("function")
    path = f"{path}.function"
    if not isinstance(function, Mapping):
        raise _wrong(path, function, "an object with a name")
    name = function.get("name")
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        allowed = "1 to 64 letters, digits, underscores, dots and hyphens"
        raise _wrong(f"{path}.name", name, allowed)
    if not isinstance(function.get("description"), str | None):
        raise _wrong(f"{path}.description", function["description"], "a string")
    if not isinstance(function.get("strict"), bool | None):
        raise _wrong(f"{path}.strict", function["strict"], "true or false")
    parameters = function.get("parameters")
    if not isinstance(parameters, Mapping | None):
        raise _wrong(f"{path}.parameters", parameters, "a JSON schema")
    is_strict = function.get("strict") is True
    return Tool(name, parameters or NO_PARAMETERS, entry, f"{path}.parameters", is_strict)


def _named_tool(choice: Mapping[str, Any], tools: Mapping[str, Tool]) -> Tool:
    if choice.get("type") != "function":
        raise _wrong("tool_choice.type", choice.get("type"), "function")
    function = choice.get("function")
    if not isinstance(function, Mapping):
        raise _wrong("tool_choice.function", function, "an object with the name of a tool")
    name = function.get("name")
    if not isinstance(name, str):
        raise _wrong("tool_choice.function.name", name, "the name of a tool")
    if name not in tools:
        raise InvalidRequest(
            f"tool_choice.function.name: {quote(name)} is none of the tools; "
            f"{nearest(name, tools)}",
            param="tool_choice.function.name",
        )
    return tools[name]


def _wrong(param: str, value: object, allowed: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param}: {quote(value)} is not allowed; must be {allowed}.", param=param
    )
