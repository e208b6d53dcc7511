"""A choice put together from its stream chunks: what the upstream would have said in one piece."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from infer_align.types import Body, Kind

# Said whole, and by some servers again with every piece: the latest counts, nothing is appended.
WHOLE = frozenset({"role", "id", "type", "index", "finish_reason", "stop_reason"})
# How many characters are a token, where nothing better is known: about what English has.
CHARACTERS = 4
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


class ChoiceBuilder:
    """Takes the chunks of one choice, in order.

    Attributes:
        finished: the upstream gave a finish_reason.
        pieces: chunks that held text, which is a token each on most servers.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.finished = False
        self.pieces = 0
        self._whole: Body | None = None
        self._fields: dict[str, Any] = {}
        self._message: dict[str, Any] = {}
        self._texts: dict[str, list[str]] = {}  # of the message, or of the choice; joined once

    def add(self, chunk: Mapping[str, Any]) -> Body | None:
        """One stream choice; -> the same as a Delta carries it, or None where it holds nothing for a reader."""
        piece = {
            key: value for key, value in chunk.items() if key not in {"index", "finish_reason"}
        }
        reason = chunk.get("finish_reason")
        delta = piece.get("delta") if self.kind == "chat" else None
        if isinstance(delta, Mapping):
            merge(self._message, self._without_texts(delta))
        beside = {
            key: value for key, value in piece.items() if key not in {"delta", "logprobs", "text"}
        }
        merge(
            self._fields,
            {**beside, **self._without_texts({"text": piece["text"]} if piece.get("text") else {})},
        )
        merge(self._fields, {"logprobs": chunk.get("logprobs")})
        self._fields["finish_reason"] = reason or self._fields.get("finish_reason")
        self.finished = self.finished or bool(reason)
        said = {
            key: value
            for key, value in (delta or {}).items()
            if key != "role" and value not in (None, "", [])
        }
        if self.kind == "chat":
            piece["delta"] = said
        speaks = bool(said) or bool(piece.get("text"))
        self.pieces += speaks
        return piece if speaks or piece.get("logprobs") else None

    def take(self, choice: Mapping[str, Any]) -> Body:
        """A choice that came in one piece; -> the same as one Delta carries it."""
        self._whole = {key: value for key, value in choice.items() if key != "index"}
        self.finished, self.pieces = True, 1
        piece = {
            key: value
            for key, value in self._whole.items()
            if key not in {"message", "finish_reason"}
        }
        if self.kind == "completion":
            return piece
        message = choice.get("message")
        said = {
            key: value
            for key, value in (message or {}).items()
            if key != "role" and value not in (None, "", [])
        }
        if isinstance(calls := said.get("tool_calls"), list):
            said["tool_calls"] = [
                {"index": i, **call} for i, call in enumerate(calls) if isinstance(call, Mapping)
            ]
        return {**piece, "delta": said}

    def _without_texts(self, piece: Mapping[str, Any]) -> dict[str, Any]:
        """What has to be merged: a text is kept in pieces, as adding to a long one copies it each time."""
        rest = {}
        for key, value in piece.items():
            if isinstance(value, str) and key not in WHOLE and key != "name":
                self._texts.setdefault(key, []).append(value)
            else:
                rest[key] = value
        return rest

    def choice(self, finish_reason: str | None = None) -> Body:
        """What there is, as an OpenAI choice without its index; `finish_reason` where the upstream gave none."""
        if self._whole is not None:
            return self._whole
        fields = {
            **self._fields,
            "finish_reason": self._fields.get("finish_reason") or finish_reason,
        }
        texts = {key: "".join(pieces) for key, pieces in self._texts.items()}
        if self.kind == "completion":
            return {"text": "", "logprobs": None, **fields, **texts}
        message = {"role": "assistant", "content": None, **self._message, **texts}
        if isinstance(calls := message.get("tool_calls"), list):
            message["tool_calls"] = [_without_index(call) for call in calls]
        return {"message": message, "logprobs": None, **fields}


def merge(into: dict[str, Any], piece: Mapping[str, Any]) -> None:
    """Add a delta to what has come: text is appended, objects are merged, lists grow, or merge by their items' `index`."""
    for key, value in piece.items():
        before = into.get(key)
        if value is None:
            into.setdefault(key, None)
        elif before is None:
            into[key] = _copy(value)
        elif key == "name" and before == value:
            continue  # repeated by servers that send it with every piece
        elif isinstance(before, str) and isinstance(value, str) and key not in WHOLE:
            into[key] = before + value
        elif isinstance(before, dict) and isinstance(value, Mapping):
            merge(before, value)
        elif isinstance(before, list) and isinstance(value, list):
            _merge_list(before, value)
        else:
            into[key] = value


def _copy(value: Any) -> Any:
    """A value that later pieces may be merged into."""
    if isinstance(value, Mapping):
        copied: dict[str, Any] = {}
        merge(copied, value)
        return copied
    if isinstance(value, list):
        grown: list[Any] = []
        _merge_list(grown, value)
        return grown
    return value


def _merge_list(into: list[Any], items: list[Any]) -> None:
    for item in items:
        place = item.get("index") if isinstance(item, Mapping) else None
        same = next(
            (known for known in into if isinstance(known, dict) and known.get("index") == place),
            None,
        )
        if place is not None and same is not None:
            merge(same, item)
        else:
            into.append(_copy(item))


def _without_index(call: Any) -> Any:
    return (
        {key: value for key, value in call.items() if key != "index"}
        if isinstance(call, dict)
        else call
    )


def shares(total: int, weights: list[int]) -> list[int]:
    """`total` cut in proportion to the weights, to whole numbers that add up to it; evenly where all weights are 0."""
    weights = weights if any(weights) else [1] * len(weights)
    ends = [round(total * sum(weights[: i + 1]) / sum(weights)) for i in range(len(weights))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def tokens(choice: Body) -> int:
    """How many were generated for a choice, as far as it shows: those that logprobs list, else one for every few characters."""
    logprobs = choice.get("logprobs")
    if isinstance(logprobs, Mapping) and isinstance(
        listed := logprobs.get("content") or logprobs.get("tokens"), list
    ):
        return len(listed)
    message = choice.get("message")
    said = (
        [v for k, v in message.items() if k != "role"]
        if isinstance(message, Mapping)
        else [choice.get("text")]
    )
    return -(
        -sum(len(value if isinstance(value, str) else str(value)) for value in said if value)
        // CHARACTERS
    )


def flaw(kind: Kind, choice: Mapping[str, Any], *, streamed: bool = False) -> str | None:
    """What keeps a choice, or a piece of one, from being one, as the end of "the upstream answered"; None for nothing."""
    if kind == "completion":
        text = choice.get("text")
        if not isinstance(text, str) and not (streamed and text is None):
            return "a choice without a text"
    else:
        message = (choice.get("delta") or {}) if streamed else choice.get("message")
        if not isinstance(message, Mapping):
            return "a choice without a message"
        if not isinstance(message.get("content"), str | list | None):
            return "a message without a text"
        if not _objects(message.get("tool_calls")):
            return "a message without tool calls where it names some"
    if not isinstance(choice.get("logprobs"), Mapping | None) or not isinstance(
        choice.get("finish_reason"), str | None
    ):
        return "a choice without proper logprobs or finish_reason"
    return (
        None
        if writable(choice)
        else "a choice without proper JSON: a number that is not finite, or half a character"
    )


def writable(value: object) -> bool:
    """Whether JSON can say it: no number that is not finite, no half of a character."""
    try:
        _encode(value).encode()
    except (ValueError, RecursionError):
        return False
    return True


def _objects(value: object) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(item, Mapping) for item in value)
    )


def count(value: object) -> int | None:
    """A number of tokens as an upstream counts them; None where it is no such number."""
    return (
        value
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40
        else None
    )
