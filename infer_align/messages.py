"""Read OpenAI messages: as plain text, and in the one form that chat templates expect.

Clients write the same conversation in many ways: content as parts or null, fields that are null,
the arguments of tool calls as JSON text. Engines, rewards and judges all read `normalize`'s form,
so that they read the same conversation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, Any]
Conversation: TypeAlias = list[dict[str, Any]]  # messages in the form of `normalize`

# Types of the parts that hold text, under the name of the field that holds it.
TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
# Types of the parts that hold what a model thought. Nobody answers to them, so they are left out.
_THINKING_PARTS = {"thinking", "redacted_thinking", "reasoning"}
# The name of a custom tool's input, where the tool is shown as a function. It is vLLM's name.
CUSTOM_INPUT = "input"
# A system message with a word that no template holds, and the turn that follows it.
SYSTEM_MARK = "infer-align-system"
SYSTEM_PROBE: tuple[Message, ...] = (
    {"role": "system", "content": SYSTEM_MARK},
    {"role": "user", "content": "x"},
)
# Put between two turns that become one.
_BREAK = "\n\n"


def text_of(content: object) -> str:
    """Return the text of a message's content, its text parts joined.

    Null and parts without text, such as images, add nothing.
    """
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    return "".join(part_text(part) or "" for part in content)


def text_with_placeholders(content: object) -> str:
    """Return the text of a message's content, with `[type]` in place of a part that is not text.

    A reader who cannot see an image still learns that there is one: "Look: [image_url]".
    """
    if not isinstance(content, list):
        return text_of(content)
    texts: list[str] = []
    for part in content:
        text = part_text(part)
        texts.append(f"[{part.get('type')}]" if text is None else text)
    return "".join(texts)


def part_text(part: object) -> str | None:
    """Return the text of one part of a message's content; None for a part of another type.

    The text of a thinking part is "".
    """
    if not isinstance(part, Mapping):
        return ""
    kind = part.get("type")
    if kind in _THINKING_PARTS:
        return ""
    if kind not in TEXT_PARTS:
        return None
    text = part.get(TEXT_PARTS[kind])
    return text if isinstance(text, str) else ""


def message_text(message: Message, read: Callable[[object], str] = text_of) -> str:
    """Return everything that a message says as plain text: its content, then its tool calls.

    A message without content has the text of its refusal, or what its audio says. Each call is a
    line of its own, such as `get_weather({"city": "Paris"})`.

    Args:
        message: an OpenAI message, of a request or of an answer.
        read: turns the content of the message into text.
    """
    text = read(message.get("content")) or _text_without_content(message)
    lines = [text] if text else []
    for call in _calls(message):
        lines.append(_call_text(call))
    return "\n".join(lines)


def transcript(messages: Sequence[Message], read: Callable[[object], str] = text_of) -> str:
    """Return a conversation as plain text: one message as it is, several as `role: text` lines.

    Args:
        messages: the conversation; it may be empty.
        read: turns the content of a message into text.
    """
    if len(messages) == 1:
        return message_text(messages[0], read)
    lines = [f"{message.get('role')}: {message_text(message, read)}" for message in messages]
    return "\n".join(lines)


def normalize(messages: Sequence[Message], *, developer: bool = False) -> Conversation:
    """Return a conversation in the form that chat templates expect.

    * Fields that are null are absent, and null content is "". Empty `tool_calls` are absent.
    * Text and refusal parts are joined; thinking parts are left out. If there are parts of another
      type, such as images, the parts stay a list.
    * The transcript of audio is the content of a message without one.
    * The arguments of a tool call are an object. Text that is no JSON object becomes {}.
    * `function_call` and the role `function` become a tool call and the role `tool`.
    * The call of a custom tool becomes the call of a function with the argument `input`.
    * The role `developer` becomes `system`, and system turns that follow each other become one.

    Args:
        messages: OpenAI messages.
        developer: True to leave the role `developer`, for a template that knows it.
    """
    turns: Conversation = []
    for message in messages:
        turn = _turn(message)
        if turn["role"] == "developer" and not developer:
            turn["role"] = "system"
        if turns and turn["role"] == turns[-1]["role"] == "system":
            turns[-1] = _joined(turns[-1], turn)
        else:
            turns.append(turn)
    return turns


def render(template: Callable[[Conversation], str], conversation: Conversation) -> str:
    """Return the text that a chat template makes of a conversation.

    A template that refuses it gets other forms of the same conversation, one after the other: with
    the system turn at the beginning of the user's turn, with neighbouring turns of one role joined,
    and with tool calls and their results as text.

    Args:
        template: writes a conversation as text, or raises.
        conversation: in the form of `normalize`.

    Raises:
        Exception: the template's first error, if it refuses every form.
    """
    refusal: Exception | None = None
    for form in _forms(conversation):
        try:
            return template(form)
        except Exception as error:
            # A template is code that comes with a model: it may raise anything.
            refusal = refusal or error
    if refusal is None:
        raise ValueError("there is no conversation to render")
    raise refusal


def calls_as_text(conversation: Conversation) -> Conversation:
    """Return a conversation with tool calls as text and their results as turns of the user.

    The form is the one of Hermes. It is for chat templates that know no tools.
    """
    turns: Conversation = []
    results: list[str] = []
    for turn in conversation:
        if turn["role"] == "tool":
            results.append(f"<tool_response>\n{text_of(turn['content'])}\n</tool_response>")
            continue
        if results:
            turns.append({"role": "user", "content": "\n".join(results)})
            results = []
        turns.append(_with_calls_as_text(turn))
    if results:
        turns.append({"role": "user", "content": "\n".join(results)})
    return turns


def called_functions(conversation: Conversation) -> set[str]:
    """Return the names of the functions that a conversation's tool calls name."""
    names: set[str] = set()
    for turn in conversation:
        for call in turn.get("tool_calls", ()):
            names.add(str(call["function"].get("name", "")))
    return names


def _turn(message: Message) -> dict[str, Any]:
    """Return one message in the form of `normalize`, its role apart."""
    turn = {key: value for key, value in message.items() if value is not None}
    turn["content"] = _content(message)
    calls = _calls(message)
    turn.pop("tool_calls", None)
    turn.pop("function_call", None)
    turn.pop("refusal", None)
    turn.pop("audio", None)
    if calls:
        turn["tool_calls"] = [_call(call) for call in calls]
    if turn.get("role") == "function":
        turn["role"] = "tool"
    return turn


def _content(message: Message) -> str | list[Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return text_of(content) or _text_without_content(message)
    if any(part_text(part) is None for part in content):
        return [part for part in content if part_text(part) != ""]
    return text_of(content)


def _text_without_content(message: Message) -> str:
    """Return the text of a message without content: its refusal, or the transcript of its audio."""
    refusal = message.get("refusal")
    if isinstance(refusal, str) and refusal:
        return refusal
    audio = message.get("audio")
    text = audio.get("transcript") if isinstance(audio, Mapping) else None
    return text if isinstance(text, str) else ""


def _calls(message: Message) -> list[Mapping[str, Any]]:
    """Return the well-formed tool calls of a message; those of other forms are left out."""
    legacy = message.get("function_call")
    if isinstance(legacy, Mapping):
        return [{"type": "function", "function": legacy}]
    calls = message.get("tool_calls")
    if not isinstance(calls, list | tuple):
        return []
    read: list[Mapping[str, Any]] = []
    for call in calls:
        custom = _field(call, "custom")
        if isinstance(_field(call, "function"), Mapping):
            read.append(call)
        elif isinstance(custom, Mapping):
            read.append(_function_call(call, custom))
    return read


def _field(call: object, name: str) -> object:
    return call.get(name) if isinstance(call, Mapping) else None


def _function_call(call: Mapping[str, Any], custom: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the call of a custom tool, whose input is free text, as the call of a function."""
    fields = {name: value for name, value in call.items() if name != "custom"}
    function = {"name": custom.get("name"), "arguments": {CUSTOM_INPUT: custom.get("input")}}
    return {**fields, "type": "function", "function": function}


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call without null fields and with its arguments as an object."""
    present = {key: value for key, value in call.items() if value is not None}
    function = {key: value for key, value in call["function"].items() if value is not None}
    return {**present, "function": {**function, "arguments": _arguments(function)}}


def _arguments(function: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    return arguments if isinstance(arguments, Mapping) else {}


def _call_text(call: Mapping[str, Any]) -> str:
    function = call["function"]
    arguments = function.get("arguments")
    parsed = _arguments(function)
    if parsed or not isinstance(arguments, str):
        arguments = json.dumps(parsed, ensure_ascii=False)
    # Arguments that are no JSON stay as the model wrote them: a reader may judge them.
    return f"{function.get('name') or ''}({arguments})"


def _with_calls_as_text(turn: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in turn:
        return turn
    content = text_of(turn["content"])
    texts = [content] if content else []
    for call in turn["tool_calls"]:
        function = call["function"]
        called = {"name": str(function.get("name")), "arguments": function["arguments"]}
        texts.append(f"<tool_call>\n{json.dumps(called, ensure_ascii=False)}\n</tool_call>")
    fields = {name: value for name, value in turn.items() if name != "tool_calls"}
    return {**fields, "content": "\n".join(texts)}


def _forms(conversation: Conversation) -> Iterator[Conversation]:
    """Yield a conversation, and the forms of it for templates that know fewer roles."""
    yield conversation
    folded = _without_system(conversation)
    alternating = _alternating(folded)
    without_tools = calls_as_text(folded)
    tried = [conversation]
    for form in (folded, alternating, without_tools, _alternating(without_tools)):
        if form not in tried:
            tried.append(form)
            yield form


def _without_system(conversation: Conversation) -> Conversation:
    """Put each system turn at the beginning of the user's turn that follows it.

    If none follows, it becomes a turn of the user.
    """
    turns: Conversation = []
    waiting: dict[str, Any] | None = None
    for turn in conversation:
        if turn["role"] == "system":
            waiting = turn if waiting is None else _joined(waiting, turn)
        elif turn["role"] == "user" and waiting is not None:
            turns.append({**_joined(waiting, turn), "role": "user"})
            waiting = None
        else:
            turns.append(turn)
    if waiting is not None:
        turns.append({**waiting, "role": "user"})
    return turns


def _alternating(conversation: Conversation) -> Conversation:
    """Join neighbouring turns of the user, and of the assistant unless they call tools."""
    turns: Conversation = []
    for turn in conversation:
        joins = bool(turns) and turn["role"] in {"user", "assistant"}
        if joins and turns[-1]["role"] == turn["role"] and not called_functions([turns[-1], turn]):
            turns[-1] = _joined(turns[-1], turn)
        else:
            turns.append(turn)
    return turns


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return one turn that says what two turns say, with the fields of the second."""
    contents = [first["content"], second["content"]]
    if any(isinstance(content, list) for content in contents):
        parts: list[Any] = []
        for content in contents:
            is_list = isinstance(content, list)
            parts += content if is_list else [{"type": "text", "text": content}]
        return {**first, **second, "content": parts}
    texts = [content for content in contents if content]
    return {**first, **second, "content": _BREAK.join(texts)}
