"""Streams of answers that must be tool calls.

vLLM's parser of a stream looks for calls only after the end of the model's reasoning. A grammar
that applies from the first token, as with `enable_in_reasoning`, leaves no room for a reasoning, so
vLLM would stream the call as content. Its parser of whole answers reads the same text correctly.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    FunctionCall,
)

MakeParser = Callable[..., Any]


class ForcedCallParser:
    """A parser of vLLM for one streamed answer that must be a tool call.

    Content is held back until a call begins. If none has begun when the answer is complete, the
    parser of whole answers reads it.

    Args:
        parser: vLLM's parser for this stream.
        make_whole: makes another one, for the whole answer.
    """

    def __init__(self, parser: Any, make_whole: Callable[[], Any]) -> None:
        self._parser = parser
        self._make_whole = make_whole
        self._text = ""
        self._token_ids: list[int] = []
        self._prompt: Sequence[int] = ()
        self._content = ""
        self._has_calls = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)

    def parse_delta(
        self,
        delta_text: str,
        delta_token_ids: list[int],
        request: Any,
        prompt_token_ids: list[int] | None = None,
        *,
        finished: bool,
    ) -> DeltaMessage | None:
        """Read new text; return what is certain now, or None."""
        self._text += delta_text
        self._token_ids += delta_token_ids
        self._prompt = prompt_token_ids or self._prompt
        delta = self._parser.parse_delta(
            delta_text, delta_token_ids, request, prompt_token_ids, finished=finished
        )
        if self._has_calls:
            return delta
        delta = delta or DeltaMessage()
        self._content += delta.content or ""
        self._has_calls = bool(delta.tool_calls)
        if self._has_calls:
            delta.content = self._content or None
        elif finished:
            delta.content, delta.tool_calls = self._read_whole(request)
        else:
            delta.content = None
        has_text = bool(delta.content or delta.reasoning or delta.tool_calls)
        return delta if has_text else None

    def _read_whole(self, request: Any) -> tuple[str | None, list[DeltaToolCall]]:
        """Return the content and the calls of the complete answer."""
        parser = self._make_whole()
        parser.set_prompt_token_ids(self._prompt)
        _, content, calls = parser.parse(
            self._text,
            request,
            enable_auto_tools=True,
            model_output_token_ids=tuple(self._token_ids),
        )
        pieces = [_piece(index, call) for index, call in enumerate(calls or ())]
        return content or None, pieces


def _piece(index: int, call: FunctionCall) -> DeltaToolCall:
    function = DeltaFunctionCall(name=call.name, arguments=call.arguments)
    call_id = call.id or f"chatcmpl-tool-{uuid.uuid4().hex[:16]}"
    return DeltaToolCall(index=index, id=call_id, type="function", function=function)


def parse_forced_calls(serving: Any) -> None:
    """Have vLLM's chat serving object read the calls of every stream in which one is required."""
    serving._make_parser = functools.partial(_make_parser, serving._make_parser)


def _make_parser(make: MakeParser, request: Any, *args: Any) -> Any:
    parser = make(request, *args)
    choice = request.tool_choice
    is_forced = bool(request.tools) and choice not in (None, "none", "auto")
    if not (is_forced and request.stream):
        return parser
    return ForcedCallParser(parser, functools.partial(make, request, *args))
