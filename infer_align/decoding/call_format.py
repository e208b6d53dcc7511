"""The text forms of tool calls: how a prompt asks for them, and which grammar forces them.

A model's chat template shows which form it was trained on. A model whose template knows no tools
gets the form of Hermes and an instruction that describes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables
from llguidance import LLMatcher

from infer_align.decoding.constraint import Grammar
from infer_align.decoding.structured_outputs import json_grammar, json_schema_of
from infer_align.decoding.tools import Tool, ToolRequest

INSTRUCTION = """\
You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

To call a function, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class CallFormat:
    """The text form of tool calls.

    Attributes:
        marker: the text that announces calls; empty if a call is announced by its brace alone.
        begin: the text before the first call, the marker included.
        between: the text between two calls; empty if there is only one call.
        end: the text after the last call.
        arguments: the key of the arguments.
    """

    marker: str
    begin: str
    between: str
    end: str
    arguments: str = "arguments"

    def head(self, name: str) -> str:
        """Return the text of a call before its arguments."""
        return f'{{"name": {json.dumps(name)}, "{self.arguments}": '

    def prefix(self, request: ToolRequest) -> str:
        """Return the beginning of an answer that must be a call. It belongs to the prompt."""
        if request.is_named:
            return self.begin + self.head(request.tools[0].name)
        return self.begin if request.is_required else ""


HERMES = CallFormat(
    marker="<tool_call>",
    begin="<tool_call>\n",
    between="\n</tool_call>\n<tool_call>\n",
    end="\n</tool_call>",
)
# For models that were not trained on calls. They would not stop after one call.
INSTRUCTED = replace(HERMES, between="")
MISTRAL = CallFormat(marker="[TOOL_CALLS]", begin="[TOOL_CALLS] [", between=", ", end="]")
LLAMA = CallFormat(marker="", begin="", between="", end="", arguments="parameters")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request to one model.

    Attributes:
        request: the tools.
        form: the text form of the model's calls.
        has_special_marker: True if the marker is a special token, which texts usually leave out.
    """

    request: ToolRequest
    form: CallFormat
    has_special_marker: bool

    @classmethod
    def of(cls, request: ToolRequest, tokenizer: Any) -> ToolUse:
        """Return the use of these tools by the model of this tokenizer."""
        form = call_format(str(tokenizer.chat_template))
        added = tokenizer.added_tokens_decoder.values()
        special = {entry.content for entry in added if entry.special}
        return cls(request, form, form.marker in special)

    @property
    def prefix(self) -> str:
        """Return the beginning of an answer that must be a call."""
        return self.form.prefix(self.request)

    @property
    def grammar(self) -> Grammar | None:
        """Return the grammar of an answer that must be a call, after its prefix."""
        return forced_grammar(self.request, self.form) if self.request.is_required else None

    def begun_grammar(self, tools: Sequence[Tool]) -> Grammar:
        """Return the grammar of the calls that the model begins by itself, after the marker.

        Models write some white space between the marker and the first call, or none.

        Args:
            tools: those of the request, with parameters that can be followed.
        """
        opening = self.form.begin.removeprefix(self.form.marker).strip()
        before = f"space? {json.dumps(opening)}" if opening else "space?"
        rules = _call_rules(tools, self.form)
        calls = _calls(self.request, self.form)
        lines = [f"start: {before} {calls}", r"space: /[ \n]/", *rules]
        return Grammar(LLMatcher.grammar_from_lark("\n".join(lines)), "tools")


@lru_cache(maxsize=16)
def shows_tools(template: str) -> bool:
    """Return True if a chat template shows the model the tools of a request.

    A template that only mentions the word, in a text or a comment, does not.
    """
    try:
        parsed = Environment(autoescape=True, extensions=["jinja2.ext.loopcontrols"]).parse(
            template
        )
    except TemplateSyntaxError:
        # Several named templates, or a tag of transformers' own.
        return "tools" in template
    return "tools" in find_undeclared_variables(parsed)


def call_format(template: str) -> CallFormat:
    """Return the form of tool calls that a chat template writes."""
    if not shows_tools(template):
        return INSTRUCTED
    if MISTRAL.marker in template:
        return MISTRAL
    is_llama = "<|python_tag|>" in template or '"parameters": dictionary' in template
    if is_llama and HERMES.marker not in template:
        return LLAMA
    return HERMES


def forced_grammar(request: ToolRequest, form: CallFormat) -> Grammar:
    """Return the grammar of an answer that must be a call, after its prefix.

    Raises:
        InvalidRequest: the parameters of a tool cannot be read.
    """
    if request.is_named:
        return argument_grammar(request.tools[0])
    rules = _call_rules(request.tools, form)
    lines = [f"start: {_calls(request, form)}", *rules]
    return Grammar(LLMatcher.grammar_from_lark("\n".join(lines)), "tools")


def argument_grammar(tool: Tool) -> Grammar:
    """Return the grammar of a tool's arguments.

    Raises:
        InvalidRequest: the parameters cannot be read.
    """
    return json_grammar(_object_schema(tool), tool.param)


def _calls(request: ToolRequest, form: CallFormat) -> str:
    """Return one call, or several and the text after them, in the language of Lark."""
    if not (request.parallel and form.between):
        return "call"
    return f"call ({json.dumps(form.between)} call)* {json.dumps(form.end)}"


def _call_rules(tools: Sequence[Tool], form: CallFormat) -> list[str]:
    """Return the rule `call` and those that it needs, in the language of Lark."""
    names = [f"call_{i}" for i in range(len(tools))]
    rules = [f"call: {' | '.join(names)}"]
    for i, (name, tool) in enumerate(zip(names, tools, strict=True)):
        # Each schema is a document of its own, so that its references stay valid.
        schema = json_schema_of(_object_schema(tool), tool.param)
        rules.append(f'{name}: {json.dumps(form.head(tool.name))} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: %json {schema}")
    return rules


def _object_schema(tool: Tool) -> Mapping[str, Any]:
    """Return the schema of a tool's arguments, which are always an object."""
    return tool.parameters if "type" in tool.parameters else {"type": "object", **tool.parameters}


def with_instruction(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the messages with a system turn that describes the tools."""
    described = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    instruction = INSTRUCTION.format(tools=described)
    copied = [dict(message) for message in messages]
    if copied and copied[0].get("role") in {"system", "developer"}:
        text = f"{copied[0].get('content') or ''}\n\n{instruction}".strip()
        return [{**copied[0], "content": text}, *copied[1:]]
    return [{"role": "system", "content": instruction}, *copied]
