"""Turn a conversation into the tokens that a reward model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from infer_align.messages import text_of
from infer_align.types import Messages

Conversation: TypeAlias = list[dict[str, Any]]  # OpenAI messages, the candidate's turn last
Encoded: TypeAlias = tuple[list[int], str | None]  # token ids, and a note


def turns(messages: Messages, text: str) -> Conversation:
    """Return the conversation with a candidate's text as its last turn."""
    return [*(_plain(message) for message in messages), {"role": "assistant", "content": text}]


def encode(tokenizer: Any, conversation: Sequence[Mapping[str, Any]], max_length: int) -> Encoded:
    """Encode a conversation by the tokenizer's chat template, or as plain text if there is none.

    A conversation of more than `max_length` tokens loses its beginning. If the template refuses the
    conversation, there are no token ids. In both cases the note says so.
    """
    try:
        ids = _token_ids(tokenizer, conversation)
    except Exception as error:
        # A template is code that came with the model: it may raise anything.
        return [], f"the reward model's chat template refused the conversation: {error}"
    if not ids:
        return [], "there are no tokens to score"
    if len(ids) <= max_length:
        return ids, None
    return ids[-max_length:], f"truncated: read the last {max_length} of {len(ids)} tokens"


def _token_ids(tokenizer: Any, conversation: Sequence[Mapping[str, Any]]) -> list[int]:
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        encoded = tokenizer(text, add_special_tokens=False)
    else:
        contents = [str(message.get("content") or "") for message in conversation]
        encoded = tokenizer("\n\n".join(contents))
    ids: list[int] = encoded["input_ids"]
    return ids


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
