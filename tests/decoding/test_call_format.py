"""Tests of the text forms of tool calls: which one a template shows, and how a prompt asks."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher

from infer_align.decoding.call_format import (
    HERMES,
    INSTRUCTED,
    LLAMA,
    MISTRAL,
    CallFormat,
    call_format,
    forced_grammar,
    shows_tools,
    with_instruction,
)
from infer_align.decoding.tools import read_tools

TEMPLATES = {
    "{% for m in messages %}{{ m.content }}{% endfor %}": INSTRUCTED,
    "{% if tools %}<tools></tools> within <tool_call></tool_call>{% endif %}": HERMES,
    "{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]": MISTRAL,
    '{% if tools %}{"name": function name, "parameters": dictionary of{% endif %}': LLAMA,
    "{% if tools is not none %}{{ '<|python_tag|>' }}{% endif %}": LLAMA,
    "{% if tools %}{{ tools | tojson }}{% endif %}": HERMES,
}
NUMBER = {"$ref": "#/$defs/n"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": NUMBER},
                "required": ["a"],
                "$defs": {"n": {"type": "integer"}},
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "other",
            "parameters": {
                "properties": {"a": NUMBER},
                "required": ["a"],
                "$defs": {"n": {"type": "boolean"}},
            },
        },
    },
    {"type": "function", "function": {"name": "bare"}},
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_shows_the_form_of_its_calls(template: str) -> None:
    assert call_format(template) == TEMPLATES[template]


@pytest.mark.parametrize("form", [HERMES, INSTRUCTED, MISTRAL, LLAMA])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_required_call_has_a_valid_grammar_in_every_form(
    form: CallFormat, parallel: bool
) -> None:
    body = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": parallel}
    request = read_tools(body)
    assert request is not None
    grammar = forced_grammar(request, form)
    assert LLMatcher.validate_grammar(grammar.text) == ""
    assert form.prefix(request) == form.begin


def test_a_named_tool_is_in_the_prompt_and_its_arguments_in_the_grammar() -> None:
    choice = {"type": "function", "function": {"name": "add"}}
    request = read_tools({"tools": TOOLS, "tool_choice": choice})
    assert request is not None
    assert HERMES.prefix(request) == '<tool_call>\n{"name": "add", "arguments": '
    assert forced_grammar(request, HERMES).param == "tools[0].function.parameters"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_instruction_joins_the_first_system_turn(role: str) -> None:
    turns: list[dict[str, Any]] = [
        {"role": role, "content": "Be brief."},
        {"role": "user", "content": "hello"},
    ]
    first, second = with_instruction(turns, TOOLS)
    assert first["role"] == role
    assert first["content"].startswith("Be brief.\n\n")
    for described in TOOLS:
        assert json.dumps(described) in first["content"]
    assert second == turns[1]
    alone = with_instruction(turns[1:], TOOLS)
    assert [turn["role"] for turn in alone] == ["system", "user"]


LOOP = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (LOOP, False),
        ("{# no tools here #}" + LOOP, False),
        ("You have no tools." + LOOP, False),
        ("{% set note = 'tools' %}{{ note }}" + LOOP, False),
        ("{% if tools %}{{ tools | tojson }}{% endif %}" + LOOP, True),
        ("{%- for tool in tools or [] -%}{{ tool }}{%- break -%}{%- endfor -%}" + LOOP, True),
        ("{% generation %}{{ tools }}{% endgeneration %}" + LOOP, True),
        (str({"default": LOOP, "tool_use": "{{ tools['x'] }}" + LOOP}), True),
        (str({"default": LOOP}), False),
    ],
)
def test_a_template_that_only_mentions_tools_does_not_show_them(template: str, shown: bool) -> None:
    assert shows_tools(template) is shown
