"""Conversion between OpenAI choices and their stream chunks.

`openai.lib.streaming` assembles chunks too, but chat only, and it would need the SDK at run time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from infer_align.decoding.tool_pieces import ToolCallNumbers, cleaned_function
from infer_align.types import Body, Kind

# Strings that are not appended when they are sent again: the latest one counts.
REPLACED = frozenset({"role", "id", "type", "index", "finish_reason", "stop_reason"})
# Characters per token of English text, for choices without logprobs.
CHARACTERS_PER_TOKEN = 4
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


class ChoiceBuilder:
    """Assembles one choice from its stream chunks, in order.

    Attributes:
        kind: "chat" or "completion".
        finished: True once a finish_reason has arrived.
        text_chunks: number of chunks that held text; on most servers each is one token.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.finished = False
        self.text_chunks = 0
        self._complete: Body | None = None
        self._fields: dict[str, Any] = {}
        self._message: dict[str, Any] = {}
        self._calls = ToolCallNumbers()
        # The chunks of each text field. Joining them once avoids copying a long text each time.
        self._texts: dict[str, list[str]] = {}

    def add(self, chunk: Mapping[str, Any]) -> Body | None:
        """Merge a stream choice; return it as a delta, or None without text and logprobs."""
        piece = self.merge_chunk(chunk)
        delta = piece["delta"] if self.kind == "chat" else None
        has_text = bool(delta or piece.get("text"))
        self.text_chunks += has_text
        return piece if has_text or piece.get("logprobs") else None

    def merge_chunk(self, chunk: Mapping[str, Any]) -> Body:
        """Merge a stream choice; return it as a delta.

        The delta has no index, role, finish_reason or empty text.
        """
        piece = _without(chunk, {"index", "finish_reason"})
        if self.kind == "chat":
            delta = self._read_delta(piece)
            self._begin_parts(delta)
            merge(self._message, self._collect_texts(delta))
            piece.pop("message", None)
            piece["delta"] = _without_empty(_without(delta, {"role"}))
        if piece.get("text"):
            merge(self._fields, self._collect_texts({"text": piece["text"]}))
        merge(self._fields, _without(piece, {"delta", "logprobs", "text"}))
        merge(self._fields, {"logprobs": chunk.get("logprobs")})
        reason = chunk.get("finish_reason")
        self._fields["finish_reason"] = reason or self._fields.get("finish_reason")
        self.finished = self.finished or bool(reason)
        return piece

    def _begin_parts(self, delta: Mapping[str, Any]) -> None:
        """Turn the text so far into a part, if the content goes on as a list of parts."""
        if isinstance(delta.get("content"), list):
            self._message["content"] = self._content_parts()

    def _content_parts(self) -> list[Any]:
        """Return the content so far as a list of parts, the latest text included."""
        parts: list[Any] = [*(self._message.get("content") or ())]
        text = "".join(self._texts.pop("content", []))
        if text:
            parts.append({"type": "text", "text": text})
        return parts

    def _read_delta(self, piece: Mapping[str, Any]) -> dict[str, Any]:
        """Return the delta of a stream choice, with the pieces of tool calls numbered."""
        delta = dict(delta_of(piece))
        if delta.get("role") == "":
            del delta["role"]
        calls = delta.get("tool_calls")
        if isinstance(calls, list):
            delta["tool_calls"] = self._calls.renumbered(calls)
        function = delta.get("function_call")
        if isinstance(function, Mapping):
            delta["function_call"] = cleaned_function(function)
        return delta

    def set_complete(self, choice: Mapping[str, Any]) -> Body:
        """Take a choice that was not streamed; return it as one delta."""
        self._complete = _without(choice, {"index"})
        self.finished = True
        self.text_chunks = 1
        piece = _without(self._complete, {"message", "finish_reason"})
        if self.kind == "chat":
            piece["delta"] = _without_empty(message_delta(choice.get("message") or {}))
        return piece

    def choice(self, finish_reason: str | None = None) -> Body:
        """Return the choice so far, without its index; `finish_reason` is used if none arrived."""
        if self._complete is not None:
            return self._complete
        reason = self._fields.get("finish_reason") or finish_reason
        fields = {**self._fields, "finish_reason": reason}
        if isinstance(self._message.get("content"), list):
            self._message["content"] = self._content_parts()
        texts = {name: "".join(chunks) for name, chunks in self._texts.items()}
        if self.kind == "completion":
            return {"text": "", "logprobs": None, **fields, **texts}
        message = {"role": "assistant", "content": None, **self._message, **texts}
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            message["tool_calls"] = [_finished_call(call) for call in calls]
        return {"message": message, "logprobs": None, **fields}

    def _collect_texts(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Store the texts among these fields; return the other fields."""
        remaining: dict[str, Any] = {}
        for name, value in fields.items():
            if isinstance(value, str) and name not in REPLACED and name != "name":
                self._texts.setdefault(name, []).append(value)
            else:
                remaining[name] = value
        return remaining


def message_delta(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a finished message as a stream delta.

    The delta has no role and no null fields, and its tool calls are numbered.
    """
    delta: dict[str, Any] = {}
    for name, value in message.items():
        if name != "role" and value is not None:
            delta[name] = value
    calls = delta.get("tool_calls")
    if isinstance(calls, list):
        numbered = enumerate(calls)
        delta["tool_calls"] = [{"index": i, **call} for i, call in numbered if _is_object(call)]
    return delta


def merge(target: dict[str, Any], delta: Mapping[str, Any]) -> None:
    """Merge a delta into what has arrived before.

    Strings are appended and objects merged. Lists grow, except that an item with an `index` is
    merged into the item of the same index.
    """
    for name, value in delta.items():
        current = target.get(name)
        if value is None:
            target.setdefault(name, None)
        elif current is None:
            target[name] = _copy(value)
        elif name == "name" and current == value:
            # Some servers repeat the name of a function with every chunk.
            continue
        elif isinstance(current, dict) and isinstance(value, Mapping):
            merge(current, value)
        elif isinstance(current, list) and isinstance(value, list):
            _merge_list(current, value)
        elif isinstance(current, str) and isinstance(value, str) and name not in REPLACED:
            target[name] = current + value
        else:
            target[name] = value


def _merge_list(target: list[Any], items: list[Any]) -> None:
    for item in items:
        same = _item_of_same_index(target, item)
        if same is None:
            target.append(_copy(item))
        else:
            merge(same, item)


def _item_of_same_index(items: list[Any], item: Any) -> dict[str, Any] | None:
    index = item.get("index") if isinstance(item, Mapping) else None
    if index is None:
        return None
    for candidate in items:
        if isinstance(candidate, dict) and candidate.get("index") == index:
            return candidate
    return None


def _copy(value: Any) -> Any:
    """Copy a value so that later chunks can be merged into it."""
    if isinstance(value, Mapping):
        copied: dict[str, Any] = {}
        merge(copied, value)
        return copied
    if isinstance(value, list):
        items: list[Any] = []
        _merge_list(items, value)
        return items
    return value


def _without(fields: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _without_empty(delta: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in delta.items() if value not in (None, "", [])}


def _finished_call(call: Any) -> Any:
    """Return a call without its number, and with arguments even if none were sent."""
    if not isinstance(call, dict):
        return call
    fields = _without(call, {"index"})
    function = fields.get("function")
    if isinstance(function, dict):
        fields["function"] = {**function, "arguments": function.get("arguments") or ""}
    return fields


def delta_of(choice: Mapping[str, Any]) -> Any:
    """Return the delta of a stream choice; some servers call it `message`."""
    return choice.get("delta") or choice.get("message") or {}


def _is_object(value: object) -> bool:
    return isinstance(value, Mapping)


def split_proportionally(total: int, weights: list[int]) -> list[int]:
    """Split `total` in proportion to the weights, into whole numbers that add up to it.

    If all weights are 0, split it evenly.
    """
    if not any(weights):
        weights = [1] * len(weights)
    parts: list[int] = []
    start = 0
    for i in range(len(weights)):
        end = round(total * sum(weights[: i + 1]) / sum(weights))
        parts.append(end - start)
        start = end
    return parts


def count_tokens(choice: Body) -> int:
    """Count the tokens of a choice: those in its logprobs, else one for every few characters."""
    logprobs = choice.get("logprobs")
    if isinstance(logprobs, Mapping):
        entries = logprobs.get("content") or logprobs.get("tokens")
        if isinstance(entries, list):
            return len(entries)
    message = choice.get("message")
    if isinstance(message, Mapping):
        texts = list(_without(message, {"role"}).values())
    else:
        texts = [choice.get("text")]
    return estimate_tokens([str(text) for text in texts if text])


def estimate_tokens(texts: Iterable[str]) -> int:
    """Return the likely number of tokens of texts: one for every few characters."""
    return -(-sum(map(len, texts)) // CHARACTERS_PER_TOKEN)


def token_count(value: object) -> int | None:
    """Return a token count that an upstream reports, or None if it is not a sensible number.

    JSON does not tell 4.0 from 4.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 0 <= value < 2**40 and value == int(value) else None


def find_defect(kind: Kind, choice: Mapping[str, Any], *, streamed: bool = False) -> str | None:
    """Describe what is wrong with a choice or a stream chunk of one, or return None.

    The description completes the sentence "the upstream answered".
    """
    if kind == "completion":
        defect = _text_defect(choice, streamed=streamed)
    else:
        message = delta_of(choice) if streamed else choice.get("message")
        defect = _message_defect(message)
    if defect is not None:
        return defect
    logprobs_valid = isinstance(choice.get("logprobs"), Mapping | None)
    if not logprobs_valid or not isinstance(choice.get("finish_reason"), str | None):
        return "a choice without proper logprobs or finish_reason"
    if not is_json(choice):
        return "a choice without proper JSON: a number that is not finite, or half a character"
    return None


def _text_defect(choice: Mapping[str, Any], *, streamed: bool) -> str | None:
    text = choice.get("text")
    if isinstance(text, str) or (streamed and text is None):
        return None
    return "a choice without a text"


def _message_defect(message: object) -> str | None:
    if not isinstance(message, Mapping):
        return "a choice without a message"
    if not isinstance(message.get("content"), str | list | None):
        return "a message without a text"
    calls = message.get("tool_calls")
    if calls is None:
        return None
    if not isinstance(calls, list) or not all(_is_object(call) for call in calls):
        return "a message without tool calls where it names some"
    return None


def is_json(value: object) -> bool:
    """Return True if JSON can hold the value: finite numbers, no half of a surrogate pair."""
    try:
        _encode(value).encode()
    except (ValueError, RecursionError):
        return False
    return True
