"""Collect one answer as it arrives: timed server-sent events, or one JSON body."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from infer_align.upstream.sse import EventParser, is_done

CONTENT_FIELDS = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")
MAX_EXCERPT = 200
MAX_MESSAGE = 500


class StreamFailed(Exception):
    """The stream carried an error event or could not be read; `kind` is the kind of error."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Answer:
    """The content times, usage and finish reason of one answer.

    Fill it with `feed` and `end` for a stream, or with `read_body` for one JSON body. Times are
    seconds on the caller's clock.
    """

    def __init__(self) -> None:
        self.first: float | None = None
        self.gaps: list[float] = []
        self.chunks = 0
        self.usage: Mapping[str, Any] = {}
        self.align: Mapping[str, Any] = {}
        self.finish_reason: str | None = None
        self._parser = EventParser()
        self._done = False
        self._last_content = 0.0

    def feed(self, received: bytes, now: float) -> None:
        """Add bytes that arrived at the time `now`; events may be split anywhere.

        Raises:
            StreamFailed: an `error` event, or data that is not a JSON object.
            ValueError: an event is too large.
        """
        for data in self._parser.feed(received):
            self._add_event(data, now)

    def end(self, now: float) -> None:
        """Finish the stream: the connection was closed at the time `now`.

        Raises:
            StreamFailed: the stream ended in the middle of an answer.
        """
        for data in self._parser.end():
            self._add_event(data, now)
        if not self._done and self.finish_reason is None:
            raise StreamFailed("stream cut", "the stream ended without a finish_reason")

    def read_body(self, body: Mapping[str, Any]) -> None:
        """Read an answer that was not streamed; it has no first token and no gaps."""
        self.usage = body.get("usage") or {}
        self.align = body.get("align") or {}
        choices = body.get("choices") or ()
        self.finish_reason = choices[0].get("finish_reason") if choices else None

    def _add_event(self, data: bytes, now: float) -> None:
        if is_done(data):
            self._done = True
            return
        chunk = _decode(data)
        error = chunk.get("error")
        if error:
            raise StreamFailed(*describe_error(error, "error event"))
        self.usage = chunk.get("usage") or self.usage
        self.align = chunk.get("align") or self.align
        for choice in chunk.get("choices") or ():
            self._add_choice(choice, now)

    def _add_choice(self, choice: Mapping[str, Any], now: float) -> None:
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if not _has_content(choice):
            return
        self.chunks += 1
        if self.first is None:
            self.first = now
        else:
            self.gaps.append(now - self._last_content)
        self._last_content = now

    def tokens(self) -> tuple[int | None, int | None, int | None]:
        """Return prompt, generated and returned tokens; None for each that usage does not count."""
        prompt = _count(self.usage.get("prompt_tokens"))
        generated = _count(self.usage.get("completion_tokens"))
        details = self.usage.get("completion_tokens_details") or {}
        accepted = _count(details.get("accepted_prediction_tokens"))
        rejected = _count(details.get("rejected_prediction_tokens"))
        # Other servers send zeros here for every answer without a prediction. Only a positive
        # count that adds up with the rejected tokens is a count of returned tokens.
        if accepted and rejected is not None and accepted + rejected == generated:
            return prompt, generated, accepted
        return prompt, generated, generated

    def align_usage(self) -> dict[str, int]:
        """Return the counts of align.usage."""
        counts = {}
        for name, value in (self.align.get("usage") or {}).items():
            count = _count(value)
            if count is not None:
                counts[name] = count
        return counts


def describe_error(error: object, kind: str) -> tuple[str, str]:
    """Return the kind with the error's code, and the message, of an OpenAI error object."""
    if not isinstance(error, Mapping):
        return kind, str(error)[:MAX_MESSAGE]
    code = error.get("code") or error.get("type")
    message = str(error.get("message"))[:MAX_MESSAGE]
    return f"{kind} {code}" if code else kind, message


def _decode(data: bytes) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError:
        raise StreamFailed("not JSON", data[:MAX_EXCERPT].decode(errors="replace")) from None
    if not isinstance(chunk, dict):
        raise StreamFailed("not JSON", f"an event is not a JSON object: {data[:MAX_EXCERPT]!r}")
    return chunk


def _has_content(choice: Mapping[str, Any]) -> bool:
    if choice.get("text"):
        return True
    delta = choice.get("delta") or {}
    return any(delta.get(name) for name in CONTENT_FIELDS)


def _count(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        return None
    return value
