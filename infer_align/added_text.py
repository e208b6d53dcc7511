"""Add a text of ours to a message or a conversation; what the client sent stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import dropwhile
from typing import Any

from infer_align.messages import TEXT_PARTS, Message

# Put between the client's text and ours.
_BREAK = "\n\n"


def prepend_text(text: str, content: object) -> str | list[Any]:
    """Return the content of a message, text or a list of parts, after a text of its own.

    It joins a text part: vLLM would set a part of its own apart by one more line break. Empty text
    parts that would stand beside it are left out, so that they need no break, as "" needs none.
    """
    if not isinstance(content, list):
        return f"{text}{_BREAK}{content}" if content else text
    parts = list(dropwhile(_is_empty, content))
    if not parts:
        return [{"type": "text", "text": text}]
    field = _text_field(parts[0])
    if field is None:
        return [{"type": "text", "text": f"{text}{_BREAK}"}, *parts]
    return [{**parts[0], field: f"{text}{_BREAK}{parts[0][field]}"}, *parts[1:]]


def append_text(content: object, text: str) -> str | list[Any]:
    """Return the content of a message before a text of its own; see `prepend_text`."""
    if not isinstance(content, list):
        return f"{content}{_BREAK}{text}" if content else text
    parts = list(dropwhile(_is_empty, reversed(content)))[::-1]
    if not parts:
        return [{"type": "text", "text": text}]
    field = _text_field(parts[-1])
    if field is None:
        return [*parts, {"type": "text", "text": f"{_BREAK}{text}"}]
    return [*parts[:-1], {**parts[-1], field: f"{parts[-1][field]}{_BREAK}{text}"}]


def with_instruction(
    messages: Sequence[Message], text: str, *, has_system_role: bool = True
) -> list[Message]:
    """Return a conversation with one more instruction in it. The client's own messages stay.

    The text ends the system message at the beginning; without one it becomes the system message.

    Args:
        messages: OpenAI messages, in any form.
        text: the instruction.
        has_system_role: False if the model sees no system message. The text then stands at the
            beginning of the first user message.
    """
    turns = list(messages)
    roles = [turn.get("role") for turn in turns]
    if not has_system_role and "user" in roles:
        i = roles.index("user")
        turns[i] = {**turns[i], "content": prepend_text(text, turns[i].get("content"))}
    elif roles and roles[0] in {"system", "developer"}:
        turns[0] = {**turns[0], "content": append_text(turns[0].get("content"), text)}
    else:
        turns.insert(0, {"role": "system", "content": text})
    return turns


def _text_field(part: Any) -> str | None:
    """Return the field that holds the text of a part; None for a part without text."""
    if not isinstance(part, Mapping) or part.get("type") not in TEXT_PARTS:
        return None
    field = TEXT_PARTS[part["type"]]
    return field if isinstance(part.get(field), str) else None


def _is_empty(part: Any) -> bool:
    field = _text_field(part)
    return field is not None and not part[field]
