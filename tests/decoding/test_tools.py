"""Tests of the tools of a request: their values, and the messages about wrong ones."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from infer_align.decoding.tools import field_schemas, read_tools
from infer_align.errors import InvalidRequest


def tool(name: Any = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def named(name: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


TOOLS = [tool("f", parameters={"type": "object"}), tool("g-2.x", description="d", strict=True)]


@pytest.mark.parametrize(
    ("fields", "names", "required", "is_named", "parallel"),
    [
        ({}, ["f", "g-2.x"], False, False, True),
        ({"tool_choice": "auto"}, ["f", "g-2.x"], False, False, True),
        ({"tool_choice": "required"}, ["f", "g-2.x"], True, False, True),
        ({"parallel_tool_calls": False}, ["f", "g-2.x"], False, False, False),
        ({"tool_choice": named("g-2.x")}, ["g-2.x"], True, True, False),
    ],
)
def test_a_choice_of_tools_is_read(
    fields: Any, names: Any, required: bool, is_named: bool, parallel: bool
) -> None:
    request = read_tools({"tools": TOOLS, **fields})
    assert request is not None
    assert [tool.name for tool in request.tools] == names
    assert (request.is_required, request.is_named) == (required, is_named)
    assert request.parallel is parallel
    assert list(request.described) == TOOLS


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"tools": [], "tool_choice": "auto"},
        {"tools": None, "parallel_tool_calls": True},
        {"tools": TOOLS, "tool_choice": "none"},
    ],
)
def test_without_tools_or_with_the_choice_none_nothing_is_called(body: dict[str, Any]) -> None:
    assert read_tools(body) is None


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("tools", {"tools": {}}),
    ("tools[0]", {"tools": ["f"]}),
    ("tools[0].type", {"tools": [{"function": {"name": "f"}}]}),
    ("tools[0].type", {"tools": [{"type": "web_search"}]}),
    ("tools[1].function", {"tools": [tool(), {"type": "function"}]}),
    ("tools[0].function.name", {"tools": [tool(None)]}),
    ("tools[0].function.name", {"tools": [tool("")]}),
    ("tools[0].function.name", {"tools": [tool("two words")]}),
    ("tools[0].function.name", {"tools": [tool("f" * 65)]}),
    ("tools[1].function.name", {"tools": [tool("f"), tool("f")]}),
    ("tools[0].function.description", {"tools": [tool(description=1)]}),
    ("tools[0].function.parameters", {"tools": [tool(parameters=[])]}),
    ("tools[0].function.strict", {"tools": [tool(strict="yes")]}),
    ("tool_choice", {"tools": TOOLS, "tool_choice": "sometimes"}),
    ("tool_choice", {"tools": TOOLS, "tool_choice": 1}),
    ("tool_choice", {"tool_choice": "required"}),
    ("tool_choice", {"tools": [], "tool_choice": "required"}),
    ("tool_choice.type", {"tools": TOOLS, "tool_choice": {"name": "f"}}),
    ("tool_choice.function", {"tools": TOOLS, "tool_choice": {"type": "function"}}),
    ("tool_choice.function.name", {"tools": TOOLS, "tool_choice": named(None)}),
    ("tool_choice.function.name", {"tools": TOOLS, "tool_choice": named("h")}),
    ("tool_choice.function.name", {"tool_choice": named("f")}),
    ("parallel_tool_calls", {"tools": TOOLS, "parallel_tool_calls": "no"}),
]


@pytest.mark.parametrize(("param", "body"), REFUSED)
def test_a_wrong_field_is_refused_by_name(param: str, body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_tools(body)
    assert refused.value.param == param
    assert refused.value.message.startswith(f"{param}:")
    assert len(refused.value.message) < 300


def test_an_unknown_tool_is_answered_with_the_nearest() -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'get_weather'"):
        read_tools({"tools": [tool("get_weather")], "tool_choice": named("get_wether")})


def test_the_described_fields_refuse_what_is_refused() -> None:
    schemas = field_schemas()
    jsonschema.validate(TOOLS, schemas["tools"])
    jsonschema.validate(None, schemas["tools"])
    for param, body in REFUSED:
        if param.startswith("tools[0]") and "tools" in body:
            assert not jsonschema.Draft202012Validator(schemas["tools"]).is_valid(body["tools"])
