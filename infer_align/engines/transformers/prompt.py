"""Prompts of the embedded engine: messages rendered by the model's chat template, as tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infer_align.decoding.call_format import shows_tools, with_instruction
from infer_align.decoding.template_variables import FIELD, template_variables
from infer_align.decoding.tools import ToolRequest
from infer_align.errors import InvalidRequest, quote
from infer_align.messages import Conversation, calls_as_text, normalize, part_text
from infer_align.messages import render as render_messages
from infer_align.types import Body, Messages


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
        """Return the tokens of the text that the answer continues; none if it begins a text."""
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
    _check_parts(body["messages"])
    template = str(tokenizer.chat_template or "")
    if not template:
        raise InvalidRequest(
            "messages: this model has no chat template; use /v1/completions.",
            param="messages",
            code="unsupported",
        )
    # "developer" is OpenAI's newer name of the system role. Most templates do not know it.
    messages = normalize(body["messages"], developer="developer" in template)
    options = {**template_variables(body.get(FIELD)), **_ending(body)}
    if "tool_calls" not in template:
        messages = calls_as_text(messages)
    if tools is not None and shows_tools(template):
        options["tools"] = list(tools.described)
    elif tools is not None:
        messages = with_instruction(messages, tools.described)

    def rendered(conversation: Conversation) -> str:
        text: str = tokenizer.apply_chat_template(conversation, tokenize=False, **options)
        return text

    try:
        return render_messages(rendered, messages)
    # A template is code that comes with the model; it may raise anything.
    except Exception as error:
        raise InvalidRequest(
            f"messages: the model's chat template refused them: {error}.", param="messages"
        ) from None


def _ending(body: Body) -> dict[str, bool]:
    """Return the template's options about the end of the prompt.

    By default the prompt ends where the assistant's turn begins.

    Raises:
        InvalidRequest: a field is no boolean, or both are true, or there is no turn to continue.
    """
    for name in ("continue_final_message", "add_generation_prompt"):
        if body.get(name) not in (None, True, False):
            raise InvalidRequest(
                f"{name}: {quote(body[name])} is not allowed; must be true or false.", param=name
            )
    continued = bool(body.get("continue_final_message"))
    if continued and body.get("add_generation_prompt"):
        raise InvalidRequest(
            "continue_final_message: cannot be true together with add_generation_prompt; "
            "set add_generation_prompt to false.",
            param="continue_final_message",
        )
    if continued and body["messages"][-1]["role"] != "assistant":
        raise InvalidRequest(
            "continue_final_message: the last message must be one of the assistant.",
            param="continue_final_message",
        )
    begins = body.get("add_generation_prompt", True) is not False and not continued
    return {"continue_final_message": continued, "add_generation_prompt": begins}


def _check_parts(messages: Messages) -> None:
    """Refuse content that is not text.

    Raises:
        InvalidRequest: naming the message and the part.
    """
    for index, message in enumerate(messages):
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            _check_part(f"messages[{index}].content", part)


def _check_part(where: str, part: Mapping[str, Any]) -> None:
    kind = part["type"]
    if part_text(part) is None:
        raise InvalidRequest(
            f"{where}: a part of type {kind!r} is not available on this engine; allowed: text.",
            param=where,
        )
    if kind in {"text", "refusal"} and not isinstance(part.get(kind), str):
        raise InvalidRequest(
            f"{where}: a part holds {quote(part)}; must hold a string {kind!r}.", param=where
        )
