"""The conversation that a reward model reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from infer_align.messages import text_of
from infer_align.types import Messages

Conversation: TypeAlias = list[dict[str, Any]]  # OpenAI messages, the candidate's turn last


def turns(messages: Messages, text: str) -> Conversation:
    """Return the conversation with a candidate's text as its last turn."""
    return [*(_plain(message) for message in messages), {"role": "assistant", "content": text}]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Join the parts of a message that holds text alone.

    Other parts stay, for a chat template that knows them.
    """
    content = message.get("content")
    if not isinstance(content, list) or not all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in content
    ):
        return dict(message)
    return {**message, "content": text_of(content)}
