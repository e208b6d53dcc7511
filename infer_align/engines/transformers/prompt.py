"""Prompts of the embedded engine: messages rendered by the model's chat template, as tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from infer_align.decoding.call_format import calls_as_text, with_instruction
from infer_align.decoding.tools import ToolRequest
from infer_align.errors import InvalidRequest, quote
from infer_align.types import Body


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        text: the prompt as text.
        ids: its tokens.
        is_continued: True if the answer goes on with the last text of the prompt, as in a text
            completion. An assistant's new turn begins a text of its own.
    """

    text: str
    ids: list[int]
    is_continued: bool = False

    @property
    def continued_ids(self) -> list[int]:
        """The tokens of the text that the answer continues; none if it begins a text."""
        return self.ids if self.is_continued else []


def tokenize(
    tokenizer: Any, text: str, param: str, *, special: bool, is_continued: bool = False
) -> Prompt:
    """Turn a rendered prompt into tokens.

    Args:
        tokenizer: the model's tokenizer.
        text: the rendered prompt.
        param: the field of the request that it comes from.
        special: True if the tokenizer adds its special tokens, such as a beginning of sequence.
        is_continued: see `Prompt`.

    Raises:
        InvalidRequest: the text is empty or not valid Unicode.
    """
    try:
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    # The tokenizer raises these for lone surrogates.
    except (TypeError, UnicodeError):
        raise InvalidRequest(f"{param}: the text is not valid Unicode.", param=param) from None
    if not ids:
        raise InvalidRequest(
            f"{param}: no tokens to start from; must not be empty for this model.", param=param
        )
    return Prompt(text, ids, is_continued)


def render(tokenizer: Any, body: Body, tools: ToolRequest | None = None) -> str:
    """Render the messages of a chat body, up to the beginning of the assistant's turn.

    A template that knows no tools gets an instruction that describes them.

    Args:
        tokenizer: the model's tokenizer.
        body: the chat body.
        tools: the tools that the model may call.

    Raises:
        InvalidRequest: the chat template refuses the messages, or a part is not text.
    """
    messages = [_joined_parts(i, message) for i, message in enumerate(body["messages"])]
    if not tokenizer.chat_template:
        raise InvalidRequest(
            "messages: this model has no chat template; use /v1/completions.",
            param="messages",
            code="unsupported",
        )
    variables = {**_template_variables(body.get("chat_template_kwargs") or {})}
    template = str(tokenizer.chat_template)
    if "tool" not in template:
        messages = calls_as_text(messages)
    if tools is not None and "tools" in template:
        variables["tools"] = list(tools.described)
    elif tools is not None:
        messages = with_instruction(messages, tools.described)
    # "developer" is OpenAI's newer name of the system role. Most templates do not know it.
    if "developer" not in template:
        messages = [_with_system_role(message) for message in messages]
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **variables
        )
    # A template is code that comes with the model; it may raise anything.
    except Exception as error:
        raise InvalidRequest(
            f"messages: the model's chat template refused them: {error}.", param="messages"
        ) from None
    return text


def _with_system_role(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "role": "system"} if message["role"] == "developer" else message


def _joined_parts(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with its text parts joined, as chat templates of text models expect."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    where = f"messages[{index}].content"
    text = "".join(_part_text(where, part) for part in content)
    return {**message, "content": text}


def _part_text(where: str, part: Mapping[str, Any]) -> str:
    kind = part["type"]
    if kind not in {"text", "refusal"}:
        raise InvalidRequest(
            f"{where}: a part of type {kind!r} is not available on this engine; allowed: text.",
            param=where,
        )
    text = part.get(kind)
    if not isinstance(text, str):
        raise InvalidRequest(
            f"{where}: a part holds {quote(part)}; must hold a string {kind!r}.", param=where
        )
    return text


def _template_variables(variables: object) -> Mapping[str, Any]:
    """Check that a client sets variables of the chat template only, not how it is rendered."""
    path = "chat_template_kwargs"
    if not isinstance(variables, Mapping):
        raise InvalidRequest(
            f"{path}: {quote(variables)} is not an object; allowed: the template's variables.",
            param=path,
        )
    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    for name in sorted(variables.keys() & parameters.keys()):
        raise InvalidRequest(
            f"{path}.{name}: is not a variable of the template; leave it out.", param=path
        )
    return variables
