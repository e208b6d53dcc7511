"""Read OpenAI messages as text.

The content of a message is a string, a list of parts such as text and images, or null.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from infer_align.types import Messages


def text_of(content: object) -> str:
    """Return the text of a message's content, its text parts joined.

    Null and parts without text, such as images, add nothing.
    """
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    return "".join(_part_text(part) for part in content)


def text_with_placeholders(content: object) -> str:
    """Return the text of a message's content, with `[type]` in place of a part that is not text.

    A reader who cannot see an image still learns that there is one: "Look: [image_url]".
    """
    if not isinstance(content, list):
        return text_of(content)
    texts: list[str] = []
    for part in content:
        is_text = part.get("type") == "text"
        texts.append(_part_text(part) if is_text else f"[{part.get('type')}]")
    return "".join(texts)


def transcript(messages: Messages, read: Callable[[object], str] = text_of) -> str:
    """Return a conversation as plain text: one message as it is, several as `role: text` lines.

    Args:
        messages: the conversation; it may be empty.
        read: turns the content of a message into text.
    """
    if len(messages) == 1:
        return read(messages[0].get("content"))
    lines = [f"{message.get('role')}: {read(message.get('content'))}" for message in messages]
    return "\n".join(lines)


def _part_text(part: object) -> str:
    if not isinstance(part, Mapping):
        return ""
    text: Any = part.get("text")
    return str(text) if text else ""
