r"""Read the fields of one record: its conversation, its answers and their ratings.

A conversation is a list of messages, one text of a user, or the text of HH-RLHF:

    "\n\nHuman: What do owls eat?\n\nAssistant: Mice."
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from infer_align.errors import quote
from infer_align.messages import message_text
from infer_align.preferences.lines import BadLineError
from infer_align.types import Messages

# The names of a field in different data sets, the preferred one first.
PROMPTS = ("messages", "prompt")
ANSWERS = ("answer", "response")
RATINGS = ("rating", "gold", "score")
# Larger ratings are refused, because their differences and squares would not be finite.
LARGEST_RATING = 1e100
# The turns of a dialogue in the text of HH-RLHF.
DIALOGUE_TURN = re.compile(r"(?:^|(?:^|\r?\n)\r?\n)(Human|Assistant):[ \t]?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def required(record: Mapping[str, Any], *names: str) -> Any:
    """Return the first of several fields that is not null.

    Raises:
        BadLineError: there is none.
    """
    for name in names:
        if record.get(name) is not None:
            return record[name]
    for name in names:
        if name in record:
            raise BadLineError(f"has no field {name!r}: it is null")
    sought = " or ".join(repr(name) for name in names)
    present = ", ".join(quote(name) for name in record)
    raise BadLineError(f"has no field {sought}" + (f"; it has {present}" if present else ""))


def read_prompt(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the conversation of a record: its messages, or its prompt as a user's turn."""
    value = required(record, *PROMPTS)
    if not isinstance(value, str):
        name = "prompt" if record.get("messages") is None else "messages"
        return checked_messages(name, value)
    if not DIALOGUE_TURN.match(value):
        return [{"role": "user", "content": unicode_text("prompt", value)}]
    turns = hh_turns(value)
    is_open = len(turns) > 1 and turns[-1] == {"role": "assistant", "content": ""}
    return [*turns[:-1]] if is_open else [*turns]


def checked_messages(name: str, value: object) -> list[Mapping[str, Any]]:
    """Return a list of messages.

    Raises:
        BadLineError: it is something else.
    """
    if not isinstance(value, list):
        raise BadLineError(f"{name} is {quote(value)}; must be a text or a list of messages")
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadLineError(f"{name}[{index}] is {quote(message)}; must be a message")
        place = f"{name}[{index}]"
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise BadLineError(f"{place} has no content")
        _check_content(place, content)
        # Every field is checked, because a role or a name can be printed too.
        unicode_text(place, json.dumps(message, ensure_ascii=False))
    return value


def _check_content(name: str, content: object) -> None:
    """Refuse content that is neither null, a text nor a list of parts.

    Raises:
        BadLineError: naming the content.
    """
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise BadLineError(f"{name} has the content {quote(content)}; must be a text or parts")
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise BadLineError(f"{name} has the part {quote(part)}; must be an object with a type")


def read_answer(name: str, value: object, messages: Messages) -> str:
    """Return the text of an answer: a text, a message, or messages after those of the prompt."""
    if isinstance(value, str):
        return unicode_text(name, value)
    if isinstance(value, dict):
        return text_of_answer(name, {"role": "assistant", **value})
    turns = _without_prompt(checked_messages(name, value), messages)
    if len(turns) != 1:
        raise BadLineError(
            f"{name} has {len(turns)} messages after those of the prompt; must be one answer"
        )
    return text_of_answer(name, turns[0])


def _without_prompt(turns: Sequence[Mapping[str, Any]], messages: Messages) -> Messages:
    """Return messages without those of the prompt, if they begin with them."""
    count = len(messages)
    beginning = [plain(turn) for turn in turns[:count]]
    is_prompt = beginning == [plain(message) for message in messages]
    return turns[count:] if is_prompt else turns


def plain(message: Mapping[str, Any]) -> tuple[object, str]:
    """Return the role and the text of a message, however it is written."""
    return message.get("role"), message_text(message)


def text_of_answer(name: str, message: Mapping[str, Any]) -> str:
    """Return the text of a message of the assistant.

    Raises:
        BadLineError: it is of another role, or has no content.
    """
    if message.get("role") != "assistant":
        raise BadLineError(
            f"{name} ends with a message of {quote(message.get('role'))}; must be of 'assistant'"
        )
    if message.get("content") is None:
        raise BadLineError(f"{name} has no content; must be a text or a message with content")
    _check_content(name, message["content"])
    return unicode_text(name, message_text(message))


def unicode_text(name: str, text: str) -> str:
    """Return a text that is Unicode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadLineError(f"{name} is no Unicode: it has half of a surrogate pair") from None
    return text


def hh_turns(text: str) -> list[dict[str, Any]]:
    """Return the messages of a dialogue in the text of HH-RLHF."""
    pieces = DIALOGUE_TURN.split(text)
    # Before the first turn there is nothing but an empty text.
    turns: list[dict[str, Any]] = []
    for role, content in zip(pieces[1::2], pieces[2::2], strict=True):
        turns.append({"role": _ROLES[role], "content": unicode_text("dialogue", content.strip())})
    return turns


def read_rating(record: Mapping[str, Any]) -> float | None:
    """Return the rating of an answer; None if it has none.

    Raises:
        BadLineError: it is no number, not finite, or too large.
    """
    for name in RATINGS:
        value = record.get(name)
        if value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # Integers are compared first: the largest ones of JSON are over every float.
        if not is_number or not -LARGEST_RATING <= value <= LARGEST_RATING:
            raise BadLineError(
                f"{name} is {quote(value)}; must be a finite number of at most {LARGEST_RATING:g}"
            )
        return float(value)
    return None


def read_model(record: Mapping[str, Any]) -> str:
    """Return the name of the model that wrote an answer, or "".

    Raises:
        BadLineError: it is no text.
    """
    model = record.get("model")
    if model is None:
        return ""
    if not isinstance(model, str):
        raise BadLineError(f"model is {quote(model)}; must be a text")
    return unicode_text("model", model)
