"""The form that a draw asks of its answers: free text, a grammar, or tool calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from infer_align.decoding import structured_outputs, tools
from infer_align.decoding.call_format import ToolUse, argument_grammar
from infer_align.decoding.constraint import (
    CompiledGrammars,
    Compiler,
    Constraint,
    ConstraintCompiler,
    Grammar,
    NotCompiled,
)
from infer_align.decoding.tools import Tool, ToolRequest
from infer_align.errors import InvalidRequest
from infer_align.types import Draw, Kind

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
# Fields that the engine reads beside the sampling parameters.
FIELDS: Mapping[Kind, frozenset[str]] = {
    "chat": structured_outputs.FIELDS | tools.FIELDS,
    "completion": structured_outputs.FIELDS,
}


def field_schemas(kind: Kind) -> dict[str, Any]:
    """Return the JSON schema of each field that `AnswerForm.read` reads, by name."""
    schemas = structured_outputs.field_schemas()
    return schemas | tools.field_schemas() if kind == "chat" else schemas


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """The form of the answers of one draw.

    Attributes:
        request: the tools that the model may call; None without tools.
        grammar: the grammar of the text; None if the text is free.
    """

    request: ToolRequest | None
    grammar: Grammar | None

    @classmethod
    def read(cls, draw: Draw) -> AnswerForm:
        """Read the body of a draw.

        Raises:
            InvalidRequest: a field is malformed, or two fields exclude each other.
        """
        request = tools.read_tools(draw.body) if draw.kind == "chat" else None
        grammar = structured_outputs.read_grammar(draw.body)
        is_forced = request is not None and request.is_required
        if is_forced and draw.body.get("structured_outputs") is not None:
            raise InvalidRequest(
                "structured_outputs: is not available when tool_choice requires a call; "
                "set only one of them.",
                param="structured_outputs",
            )
        return cls(request, grammar)

    @property
    def is_free(self) -> bool:
        """Return True if the answers need no grammar."""
        return self.request is None and self.grammar is None

    def is_compiled(self, grammars: ConstraintCompiler, tokenizer: Any) -> bool:
        """Return True if all of its grammars have been compiled."""
        try:
            self._compile(CompiledGrammars(grammars), tokenizer)
        except NotCompiled:
            return False
        return True

    def compile(self, grammars: ConstraintCompiler, tokenizer: Any) -> None:
        """Compile all of its grammars, so that nothing else waits for that later.

        A grammar that is wrong or too large is an error later.
        """
        self._compile(grammars, tokenizer)

    def _compile(self, grammars: Compiler, tokenizer: Any) -> None:
        try:
            self.check(grammars)
            use = self.tool_use(tokenizer)
            self.constraint(grammars, use)
            self.call_constraint(grammars, use)
        except InvalidRequest:
            return

    def check(self, grammars: Compiler) -> None:
        """Compile all grammars.

        Raises:
            InvalidRequest: naming the field of a grammar that is wrong or too large.
        """
        if self.grammar is not None:
            grammars.compile(self.grammar)
        for tool in self.request.tools if self.request is not None else ():
            if tool.is_strict or (self.request is not None and self.request.is_required):
                grammars.compile(argument_grammar(tool))

    def tool_use(self, tokenizer: Any) -> ToolUse | None:
        """Return the use of the tools by the model of this tokenizer; None without tools."""
        return None if self.request is None else ToolUse.of(self.request, tokenizer)

    def constraint(self, grammars: Compiler, use: ToolUse | None) -> Constraint | None:
        """Return the compiled grammar of the answers; None if they are free.

        A call that is required comes before a response format.
        """
        call_grammar = use.grammar if use else None
        grammar = self.grammar if call_grammar is None else call_grammar
        return None if grammar is None else grammars.compile(grammar)

    def call_constraint(self, grammars: Compiler, use: ToolUse | None) -> Constraint | None:
        """Return the compiled grammar of calls that the model may begin by itself.

        None if there are no such calls, or if the answers follow another grammar.
        """
        if use is None or use.request.is_required or self.grammar is not None:
            return None
        try:
            return grammars.compile(use.begun_grammar(use.request.tools))
        except InvalidRequest:
            tools = [_with_readable_schema(tool, grammars) for tool in use.request.tools]
            return grammars.compile(use.begun_grammar(tools))


def _with_readable_schema(tool: Tool, grammars: Compiler) -> Tool:
    """Return the tool, with any object as its arguments if its schema cannot be followed."""
    try:
        grammars.compile(argument_grammar(tool))
    except InvalidRequest:
        return replace(tool, parameters=ANY_OBJECT)
    return tool
