"""The conversation that a reward model reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from infer_align.errors import InvalidRequest
from infer_align.messages import Conversation, normalize, part_text
from infer_align.types import Candidate, Messages

# The fields of a candidate's message that rewards read. Its reasoning is not one of them.
_ANSWER_FIELDS = ("content", "refusal", "audio", "tool_calls", "function_call")


def turns(messages: Messages, candidate: Candidate) -> Conversation:
    """Return the conversation with a candidate as its last turn, tool calls included."""
    choice = candidate.choice
    message = choice.get("message") or {"content": choice.get("text")}
    answer: dict[str, Any] = {"role": "assistant"}
    for name in _ANSWER_FIELDS:
        answer[name] = message.get(name)
    return [*normalize(messages), *normalize([answer])]


def json_turns(messages: Messages, candidate: Candidate) -> Conversation:
    """Return `turns` as OpenAI's API takes it: with the arguments of tool calls as JSON text."""
    conversation = turns(messages, candidate)
    for turn in conversation:
        for call in turn.get("tool_calls", ()):
            function: dict[str, Any] = call["function"]
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return conversation


def check_text_only(where: str, messages: Messages) -> None:
    """Refuse a conversation with parts that a text model cannot read, such as images.

    Args:
        where: the field of the request that names the reward.
        messages: the client's messages.

    Raises:
        InvalidRequest: naming the reward, the message and the type of the part.
    """
    for index, message in enumerate(messages):
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part_text(part) is None:
                raise InvalidRequest(
                    f"{where}: reads text only, but messages[{index}] has a part of type "
                    f"{_type_of(part)!r}; remove the part, or use another reward.",
                    param=where,
                )


def _type_of(part: Mapping[str, Any]) -> str:
    return str(part.get("type"))
