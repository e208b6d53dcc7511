"""Tool calls in sampled text, found while it is streamed.

    text -> content, until a call is announced
         -> the head of a call: its name, sent once it is complete
         -> the arguments, sent as they arrive

transformers parses a message when it is complete, and only for models whose tokenizer describes
their answers (`response_template`). Text that announces a call and holds none is content.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

from infer_align.decoding.call_format import CallFormat
from infer_align.decoding.tools import ToolRequest
from infer_align.types import Body

_STRING = r'"((?:[^"\\]|\\.)*)"'
_HEAD = re.compile(
    rf'\{{\s*"name"\s*:\s*{_STRING}\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)', re.DOTALL
)
_DECODER = json.JSONDecoder()


class _State(Enum):
    CONTENT = auto()  # free text
    HEAD = auto()  # a call is announced
    ARGUMENTS = auto()  # inside the arguments of a call
    AFTER = auto()  # behind the arguments of a call
    DONE = auto()  # what follows is ignored


class CallStream:
    """Content and tool calls of one candidate.

    Args:
        request: the tools of the request.
        form: the text form of calls.
        new_id: returns the id of the call with this index.
    """

    def __init__(
        self, request: ToolRequest, form: CallFormat, new_id: Callable[[int], str]
    ) -> None:
        self._request = request
        self._form = form
        self._new_id = new_id
        self._buffer = ""
        self._content = ""
        self._calls: list[dict[str, Any]] = []
        self._scanner = _ObjectScanner()
        self._state = _State.HEAD if request.is_required else _State.CONTENT
        # The pieces of the delta that is being made.
        self._delta: dict[str, Any] = {}
        # The text since a call was announced, in case there is none.
        self._announcement = ""

    @property
    def has_calls(self) -> bool:
        """Return True if the text holds a call."""
        return bool(self._calls)

    def begun_call(self) -> str | None:
        """Return the first call as far as it is written, from behind the marker on; None without.

        Without a marker, a call is certain once its name is followed by the key of its arguments.
        """
        if self._request.is_required or len(self._calls) > 1:
            return None
        if not self._calls:
            is_announced = self._state is _State.HEAD and bool(self._form.marker)
            return self._buffer if is_announced else None
        if self._form.marker or self._state is not _State.ARGUMENTS:
            return None
        function = self._calls[0]["function"]
        return self._form.head(function["name"]) + str(function["arguments"])

    def push(self, text: str) -> Body:
        """Take new text; return the fields of the delta that is certain now, often none."""
        self._delta = {}
        if self._request.is_named and not self._calls:
            self._add_call(self._request.tools[0].name)
            self._state = _State.ARGUMENTS
        self._buffer += text
        self._advance()
        return self._delta

    def finish(self, text: str) -> Body:
        """Take the last text; return the fields of the last delta."""
        self.push(text)
        if self._state is _State.HEAD:
            self._give_up()
        if self._state is _State.CONTENT:
            self._add_content(self._buffer)
        self._buffer = ""
        return self._delta

    def message(self) -> dict[str, Any]:
        """Return the message so far."""
        message: dict[str, Any] = {
            "role": "assistant",
            "content": self._content or (None if self._calls else ""),
            "refusal": None,
        }
        if self._calls:
            # Copies, because later pieces are added to the calls.
            message["tool_calls"] = copy.deepcopy(self._calls)
        return message

    def finish_reason(self, reason: str) -> str:
        """Return OpenAI's finish_reason. A tool that was named ends with "stop"."""
        called = reason == "stop" and self.has_calls and not self._request.is_named
        return "tool_calls" if called else reason

    def _advance(self) -> None:
        """Read as much of the buffer as is certain."""
        while True:
            state = self._state
            _STEPS[state](self)
            if self._state is state:
                return

    def _read_content(self) -> None:
        marker = self._form.marker
        if not marker:
            self._read_bare_call()
            return
        before, is_announced, after = self._buffer.partition(marker)
        if is_announced:
            self._add_content(before.rstrip())
            self._announcement = before[len(before.rstrip()) :] + marker
            self._buffer = after
            self._state = _State.HEAD
            return
        # The end of the buffer may begin the marker, and white space before it is not content.
        certain = len(self._buffer) - _overlap(self._buffer, marker)
        certain = len(self._buffer[:certain].rstrip())
        self._add_content(self._buffer[:certain])
        self._buffer = self._buffer[certain:]

    def _read_bare_call(self) -> None:
        """Read the beginning of an answer that is a call if it begins with a brace."""
        text = self._buffer.lstrip()
        if self._content or (text and not text.startswith("{")):
            self._add_content(self._buffer)
            self._buffer = ""
        elif text:
            self._state = _State.HEAD

    def _read_head(self) -> None:
        start = self._buffer.find("{")
        opening = self._buffer if start < 0 else self._buffer[:start]
        if opening.strip(" \t\r\n[,"):
            self._give_up()
            return
        if start < 0:
            return
        head = _HEAD.match(self._buffer, start)
        if head:
            self._add_call(json.loads(f'"{head[1]}"', strict=False))
            self._buffer = self._buffer[head.end() :]
            self._state = _State.ARGUMENTS
            return
        self._read_whole_call(start)

    def _read_whole_call(self, start: int) -> None:
        """Read a call whose keys have another order, once it is complete."""
        try:
            call, end = _DECODER.raw_decode(self._buffer, start)
        except ValueError:
            return
        arguments = call.get("arguments", call.get("parameters", {}))
        if not isinstance(call.get("name"), str):
            self._give_up()
            return
        self._add_call(call["name"])
        is_text = isinstance(arguments, str)
        self._add_arguments(arguments if is_text else json.dumps(arguments, ensure_ascii=False))
        self._buffer = "}" + self._buffer[end:]
        self._state = _State.AFTER

    def _read_arguments(self) -> None:
        length = self._scanner.push(self._buffer)
        self._add_arguments(self._buffer[:length])
        self._buffer = self._buffer[length:]
        if self._scanner.is_complete:
            self._scanner = _ObjectScanner()
            self._state = _State.AFTER

    def _read_after(self) -> None:
        """Look for another call."""
        if not self._request.parallel or not self._form.between:
            self._state = _State.DONE
            return
        rest = self._buffer.lstrip()
        if not rest.startswith("}"):
            return
        rest = rest[1:].lstrip()
        # The text between calls, in whichever white space the model writes it.
        for part in self._form.between.split():
            if not rest.startswith(part):
                if not part.startswith(rest):
                    self._state = _State.DONE
                return
            rest = rest[len(part) :].lstrip()
        self._buffer = rest
        self._announcement = ""
        self._state = _State.HEAD

    def _ignore(self) -> None:
        self._buffer = ""

    def _give_up(self) -> None:
        """Turn text that announces a call into content."""
        if self._calls:
            self._state = _State.DONE
            return
        self._add_content(self._announcement + self._buffer)
        self._announcement = ""
        self._buffer = ""
        self._state = _State.CONTENT

    def _add_content(self, text: str) -> None:
        if text:
            self._content += text
            self._delta["content"] = self._delta.get("content", "") + text

    def _add_call(self, name: str) -> None:
        index = len(self._calls)
        call = {"id": self._new_id(index), "type": "function"}
        self._calls.append({**call, "function": {"name": name, "arguments": ""}})
        pieces = self._delta.setdefault("tool_calls", [])
        pieces.append({"index": index, **call, "function": {"name": name, "arguments": ""}})

    def _add_arguments(self, text: str) -> None:
        if not text:
            return
        self._calls[-1]["function"]["arguments"] += text
        index = len(self._calls) - 1
        pieces = self._delta.setdefault("tool_calls", [])
        if pieces and pieces[-1]["index"] == index:
            pieces[-1]["function"]["arguments"] += text
        else:
            pieces.append({"index": index, "function": {"arguments": text}})


_STEPS: dict[_State, Callable[[CallStream], None]] = {
    _State.CONTENT: CallStream._read_content,
    _State.HEAD: CallStream._read_head,
    _State.ARGUMENTS: CallStream._read_arguments,
    _State.AFTER: CallStream._read_after,
    _State.DONE: CallStream._ignore,
}


class _ObjectScanner:
    """Finds the end of a JSON object that arrives in pieces.

    Attributes:
        is_complete: True once the object's last brace has arrived.
    """

    def __init__(self) -> None:
        self.is_complete = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def push(self, text: str) -> int:
        """Return the number of characters that belong to the object."""
        for i, character in enumerate(text):
            if self._in_string:
                self._read_in_string(character)
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.is_complete = True
                    return i + 1
        return len(text)

    def _read_in_string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False


def _overlap(text: str, marker: str) -> int:
    """Return the length of the longest end of the text that begins the marker."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0
