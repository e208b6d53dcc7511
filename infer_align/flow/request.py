"""Parse an OpenAI body with an `align` object into a Request. Nothing is spent here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from infer_align.config import registry
from infer_align.config.align import Align, parse_align
from infer_align.errors import InvalidRequest, quote
from infer_align.flow.applied_profile import AppliedProfile
from infer_align.messages import message_text
from infer_align.types import Body, Kind, Messages

# Fields of a body that are whole numbers.
WHOLE_NUMBERS = frozenset(
    {
        "n",
        "seed",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "logprobs",
        "top_logprobs",
        "top_k",
        "best_of",
    }
)


# The forms of the prompt of a text completion, for messages.
# An assistant's message may consist of tool calls alone, and a tool may return nothing.
_ROLES_WITHOUT_CONTENT = frozenset({"assistant", "function", "tool"})
_PROMPTS = "a string, a list of token ids, or a list of strings or of lists of token ids"


@dataclass(frozen=True, slots=True)
class Request:
    """One OpenAI request: the client's body without `align`, and the parsed `align`."""

    body: Body
    kind: Kind = "chat"
    align: Align = field(default_factory=Align)
    # True if the client sent `align` or chose a preset: only then does the response carry one.
    aligned: bool = False
    # {reward: weight} that a profile chose for a request that names no rewards, and what it
    # changed. Written by `infer_align.flow.personal`.
    weights: Mapping[str, float] | None = None
    profile: AppliedProfile | None = None

    def reward_weights(self, *, selects: bool) -> Mapping[str, float] | None:
        """Return {reward: weight} as the client, or else its profile, chose them.

        Args:
            selects: True if candidates are compared. A profile weighs nothing otherwise.
        """
        if self.align.rewards is None and selects:
            return self.weights
        return self.align.rewards


def parse_request(
    body: Body,
    kind: Kind,
    presets: Mapping[str, Mapping[str, Any]],
    preset: str | None = None,
) -> Request:
    """Split a body into the part for the engine and the parsed `align`.

    Args:
        body: the client's JSON object.
        kind: "chat" or "completion", by the route.
        presets: named `align` objects of the configuration.
        preset: the preset that the model's name selects; `align.preset` wins over it.

    Raises:
        InvalidRequest: the first wrong field, by its dotted path.
    """
    check_prompt(body, kind)
    check_placement(body)
    align = body.get("align")
    forwarded: dict[str, Any] = {}
    for key, value in body.items():
        if key == "align" or value is None:
            continue
        forwarded[key] = whole_number(value) if key in WHOLE_NUMBERS else value
    if align is None and preset is None:
        return Request(forwarded, kind)
    parsed = parse_align({} if align is None else align, presets, preset)
    return Request(forwarded, kind, parsed, aligned=True)


def split_prompts(body: Body, kind: Kind) -> list[Body]:
    """Return one body per prompt of a request.

    The `prompt` of a text completion is a string, a list of token ids, or a list of either.

    Raises:
        InvalidRequest: the list is empty, or an item is not what the first item is.
    """
    prompts = body.get("prompt")
    if kind == "chat" or not isinstance(prompts, list):
        return [body]
    if not prompts:
        raise InvalidRequest(f"prompt: [] is not allowed; must be {_PROMPTS}.", param="prompt")
    prompts = _whole_tokens(prompts)
    body = {**body, "prompt": prompts}
    is_item = _item_check(prompts[0])
    for i, item in enumerate(prompts):
        if not is_item(item):
            raise InvalidRequest(
                f"prompt[{i}]: {quote(item)} is not allowed; prompt must be {_PROMPTS}.",
                param=f"prompt[{i}]",
            )
    if is_item is _is_token:
        return [body]
    return [{**body, "prompt": prompt} for prompt in prompts]


def _whole_tokens(prompts: list[Any]) -> list[Any]:
    """Return the token ids of a `prompt` as integers, where a client wrote 4 as 4.0."""
    tokens: list[Any] = []
    for item in prompts:
        is_list = isinstance(item, list)
        tokens.append([whole_number(each) for each in item] if is_list else whole_number(item))
    return tokens


def _item_check(first: object) -> Callable[[object], bool]:
    """Return the check of all items of a `prompt` that begins with this item."""
    if isinstance(first, str):
        return _is_text
    return _is_token_list if isinstance(first, list) else _is_token


def _is_text(item: object) -> bool:
    return isinstance(item, str)


def _is_token(item: object) -> bool:
    """Return True for a number that may be a token id; the engine knows how many there are."""
    return isinstance(item, int) and not isinstance(item, bool) and item >= 0


def _is_token_list(item: object) -> bool:
    return isinstance(item, list) and bool(item) and all(_is_token(token) for token in item)


def conversation(
    body: Body, kind: Kind, text_of_tokens: Callable[[Sequence[int]], str]
) -> Messages:
    """Return the conversation that rewards and judges read.

    The prompt of a text completion becomes one message of the user.

    Args:
        body: the body of the request.
        kind: its kind.
        text_of_tokens: turns a prompt of token ids into text, or refuses it.

    Raises:
        InvalidRequest: the prompt cannot be turned into text.
    """
    if kind == "chat":
        messages: Messages = body.get("messages", ())
        return messages
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        prompt = text_of_tokens(prompt)
    if isinstance(prompt, str) and prompt:
        return [{"role": "user", "content": prompt}]
    return []


def check_placement(body: Body) -> None:
    """Refuse a method beside `align` instead of inside it, which no engine would read.

    Raises:
        InvalidRequest: naming the method.
    """
    for name in registry.methods.names():
        if body.get(name) is not None:
            raise InvalidRequest(
                f"{name}: is a key of align, not of the body; write it inside align: "
                f'{{"align": {{"{name}": ...}}}}.',
                param=name,
            )


def whole_number(value: object) -> object:
    """Return a float without a fraction as an integer, and any other value as it is.

    JSON has one type of number: some clients write 4 as 4.0.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def check_prompt(body: Body, kind: Kind) -> None:
    """Check the shape of the prompt that every engine relies on.

    The rest of a message is checked by the engine and its chat template.

    Raises:
        InvalidRequest: the prompt or a message has the wrong shape.
    """
    name = "messages" if kind == "chat" else "prompt"
    if name not in body:
        expected = "a list of at least one message" if kind == "chat" else _PROMPTS
        raise InvalidRequest(f"{name}: is required: {expected}.", param=name)
    if kind == "chat":
        _check_messages(body["messages"])
        return
    prompt = body["prompt"]
    if not isinstance(prompt, str) and not _is_token_list(prompt):
        raise InvalidRequest(
            f"prompt: {quote(prompt)} is not allowed; must be {_PROMPTS}.", param="prompt"
        )


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest(
            f"messages: {quote(messages)} is not allowed; must be a list of at least one message.",
            param="messages",
        )
    for i, message in enumerate(messages):
        _check_message(message, f"messages[{i}]")


def _check_message(message: object, param: str) -> None:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(
            f"{param}: {quote(message)} is not allowed; must be an object with a role.",
            param=param,
        )
    _check_tool_calls(message.get("tool_calls"), f"{param}.tool_calls")
    content = message.get("content")
    if content is None and message["role"] in _ROLES_WITHOUT_CONTENT:
        return
    if not isinstance(content, str | list):
        raise InvalidRequest(
            f"{param}.content: {quote(content)} is not allowed; must be text or a list of parts.",
            param=f"{param}.content",
        )
    if isinstance(content, list):
        for j, part in enumerate(content):
            _check_part(part, f"{param}.content[{j}]")


def _check_tool_calls(calls: object, param: str) -> None:
    if calls is None:
        return
    if not isinstance(calls, list):
        raise InvalidRequest(
            f"{param}: {quote(calls)} is not allowed; must be a list of tool calls.", param=param
        )
    for call in calls:
        if not _names_a_tool(call):
            raise InvalidRequest(
                f"{param}: {quote(call)} is not allowed; must be an object with a function, which "
                "has a name and arguments, or with a custom tool.",
                param=param,
            )


def _names_a_tool(call: object) -> bool:
    if not isinstance(call, Mapping):
        return False
    tools = (call.get("function"), call.get("custom"))
    return any(isinstance(tool, Mapping) and isinstance(tool.get("name"), str) for tool in tools)


def _check_part(part: object, param: str) -> None:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise InvalidRequest(
            f"{param}: {quote(part)} is not allowed; must be an object with a type.", param=param
        )
    text = part.get("text")
    if part["type"] == "text" and not isinstance(text, str):
        raise InvalidRequest(
            f"{param}.text: {quote(text)} is not allowed; must be a string.",
            param=f"{param}.text",
        )


def split_begun_answer(body: Body, messages: Messages) -> tuple[Messages, str]:
    """Return the conversation before the answer, and the beginning of the answer.

    With `continue_final_message` the last message is the beginning of the answer.
    """
    if not body.get("continue_final_message") or not messages:
        return messages, ""
    return messages[:-1], message_text(messages[-1])


def count_prompts(prompt: object) -> int:
    """Return the number of prompts of a completion request; a list of tokens is one prompt."""
    if isinstance(prompt, list) and any(isinstance(item, str | list) for item in prompt):
        return len(prompt)
    return 1
