"""A conversation as the tokens that a reward model reads: through its chat template, without its beginning where it is too long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from infer_align.types import Messages

Encoded: TypeAlias = tuple[list[int], str | None]  # token ids, and a note


def turns(messages: Messages, text: str) -> list[dict[str, Any]]:
    """The conversation with a candidate as its last turn."""
    return [*(_plain(message) for message in messages), {"role": "assistant", "content": text}]


def encode(tokenizer: Any, conversation: Sequence[Mapping[str, Any]], max_length: int) -> Encoded:
    """Token ids and a note; no ids where the chat template refuses the conversation."""
    try:
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(conversation, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer("\n\n".join(str(m.get("content") or "") for m in conversation))[
                "input_ids"
            ]
    except (
        Exception
    ) as error:  # a template is code that came with the model, and what it raises is up to it
        return [], f"the reward model's chat template refused the conversation: {error}"
    if not ids:
        return [], "there are no tokens to score"
    if len(ids) <= max_length:
        return ids, None
    return ids[-max_length:], f"truncated: read the last {max_length} of {len(ids)} tokens"


def member_names(
    names: Sequence[str], labels: Sequence[int], attributes: Sequence[str]
) -> tuple[str, ...]:
    """The members of an ensemble: a model of K labels is K of them, or one where its labels are objectives."""
    if attributes:
        return tuple(names)
    return tuple(
        name if count == 1 else f"{name}#{i}"
        for name, count in zip(names, labels, strict=True)
        for i in range(count)
    )


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its text parts joined; other parts stay for a chat template that knows them."""
    content = message.get("content")
    if not isinstance(content, list) or not all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in content
    ):
        return dict(message)
    return {**message, "content": "".join(str(part.get("text", "")) for part in content)}
