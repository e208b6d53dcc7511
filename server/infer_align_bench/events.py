"""Reading an answer as it arrives: server-sent events with the time of each, or one JSON body."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

CONTENT = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")


class StreamFailed(Exception):
    """The stream said so itself, or could not be read; `kind` is the error's kind."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Answer:
    """What is known of one answer so far."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.gaps: list[float] = []
        self.chunks = 0
        self.usage: Mapping[str, Any] = {}
        self.align: Mapping[str, Any] = {}
        self.finish_reason: str | None = None
        self._done = False
        self._last = 0.0
        self._rest = b""

    def feed(self, data: bytes, now: float) -> None:
        """Bytes as they came from the socket at `now`, seconds; events may be split anywhere.

        Raises:
            StreamFailed: an `error` event, or data that is not JSON.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def end(self) -> None:
        """The connection has ended.

        Raises:
            StreamFailed: in the middle of an answer.
        """
        if not self._done and self.finish_reason is None:
            raise StreamFailed("stream cut", "the stream ended without a finish_reason")

    def whole(self, body: Mapping[str, Any]) -> None:
        """An answer that was not streamed: no first token and no gaps are known."""
        self.usage, self.align = body.get("usage") or {}, body.get("align") or {}
        self.finish_reason = next((c.get("finish_reason") for c in body.get("choices") or ()), None)

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self._done = True
            return
        try:
            chunk = json.loads(data)
        except ValueError:
            raise StreamFailed("not JSON", data[:200].decode(errors="replace")) from None
        if not isinstance(chunk, dict):
            raise StreamFailed("not JSON", f"an event is no object: {data[:200]!r}")
        if error := chunk.get("error"):
            raise StreamFailed(*described(error, "error event"))
        self.usage = chunk.get("usage") or self.usage
        self.align = chunk.get("align") or self.align
        for choice in chunk.get("choices") or ():
            self._choice(choice, now)

    def _choice(self, choice: Mapping[str, Any], now: float) -> None:
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        delta = choice.get("delta") or {}
        if not (choice.get("text") or any(delta.get(key) for key in CONTENT)):
            return
        self.chunks += 1
        if self.first is None:
            self.first = now
        else:
            self.gaps.append(now - self._last)
        self._last = now

    def tokens(self) -> tuple[int | None, int | None, int | None]:
        """Prompt tokens, completion tokens spent, and those that were returned; None where usage does not say."""
        prompt, spent = (
            _count(self.usage.get("prompt_tokens")),
            _count(self.usage.get("completion_tokens")),
        )
        details = self.usage.get("completion_tokens_details") or {}
        accepted, rejected = (
            _count(details.get(f"{word}_prediction_tokens")) for word in ("accepted", "rejected")
        )
        # Others send zeros here for answers without a prediction: only a pair that adds up says what was returned.
        split = (
            accepted is not None
            and rejected is not None
            and accepted + rejected == spent
            and accepted > 0
        )
        return prompt, spent, accepted if split else spent

    def align_usage(self) -> dict[str, int]:
        """The counts of align.usage."""
        usage = self.align.get("usage") or {}
        return {
            name: count for name, value in usage.items() if (count := _count(value)) is not None
        }


def described(error: object, kind: str) -> tuple[str, str]:
    """An OpenAI error object as (kind with its code, message)."""
    if not isinstance(error, Mapping):
        return kind, str(error)[:500]
    code = error.get("code") or error.get("type")
    return f"{kind} {code}" if code else kind, str(error.get("message"))[:500]


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
