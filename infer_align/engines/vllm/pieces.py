"""A streamed choice put together again: what its deltas say is what the whole answer would have said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infer_align.types import Kind


class Pieces:
    """The chunks of one choice, as vLLM streams them.

    Attributes:
        choice: the whole, so far.
        usage: vLLM's own count, after the last chunk.
    """

    def __init__(self, kind: Kind) -> None:
        self._chat = kind == "chat"
        self.choice: dict[str, Any] = {"logprobs": None, "finish_reason": None, "stop_reason": None}
        self.choice |= (
            {"message": {"role": "assistant", "content": None, "reasoning": None}}
            if self._chat
            else {"text": ""}
        )
        self.usage: dict[str, int] = {"prompt_tokens": 0, "completion_tokens": 0}

    def add(self, chunk: Mapping[str, Any]) -> dict[str, Any] | None:
        """Take a chunk; -> the piece that a client gets, None where it adds nothing. How it ended is said at the end, not here."""
        self.usage = chunk.get("usage") or self.usage
        if not chunk.get("choices"):
            return None
        piece = {
            key: value
            for key, value in chunk["choices"][0].items()
            if key != "index" and value is not None
        }
        for key in ("finish_reason", "stop_reason"):
            self.choice[key] = piece.pop(key, self.choice[key])
        if logprobs := piece.get("logprobs"):
            _extend(self.choice, "logprobs", logprobs)
        if tokens := piece.get("token_ids"):
            self.choice["token_ids"] = [*self.choice.get("token_ids", ()), *tokens]
        if self._chat:
            delta = {
                key: value
                for key, value in piece["delta"].items()
                if key != "role" and value not in (None, "")
            }
            piece["delta"] = delta
            self._say(delta)
            return piece if delta or len(piece) > 1 else None
        self.choice["text"] += piece["text"]
        return piece if piece["text"] or len(piece) > 1 else None

    def _say(self, delta: Mapping[str, Any]) -> None:
        message = self.choice["message"]
        for key, value in delta.items():
            if key == "tool_calls":
                for call in value:
                    self._call(call)
            else:
                message[key] = (message.get(key) or "") + value if isinstance(value, str) else value
        if (
            not delta
            and message["content"] is None
            and not message.get("tool_calls")
            and not message["reasoning"]
        ):
            message["content"] = ""

    def _call(self, piece: Mapping[str, Any]) -> None:
        calls = self.choice["message"].setdefault("tool_calls", [])
        while len(calls) <= piece["index"]:
            calls.append(
                {"id": None, "type": "function", "function": {"name": None, "arguments": ""}}
            )
        call = calls[piece["index"]]
        function = piece.get("function") or {}
        call["id"] = piece.get("id") or call["id"]
        call["function"]["name"] = function.get("name") or call["function"]["name"]
        call["function"]["arguments"] += function.get("arguments") or ""


def _extend(choice: dict[str, Any], key: str, more: Mapping[str, Any]) -> None:
    """Lists in parallel, such as the tokens of logprobs and what is known of each."""
    so_far = choice[key] or {}
    choice[key] = {
        name: [*so_far.get(name, ()), *value] if isinstance(value, list) else value
        for name, value in more.items()
    }
