"""The chunks of a streamed completion, as server-sent events in the format of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infer_align.decoding.stream import delta_of, message_delta
from infer_align.errors import AlignError
from infer_align.flow.request import Request
from infer_align.flow.response import Response
from infer_align.types import Candidate, Delta
from infer_align_server.wire.completion import (
    OBJECTS,
    has_report,
    report_json,
    returned_candidates,
    total_usage_json,
)
from infer_align_server.wire.encoding import dumps
from infer_align_server.wire.errors import error_json

# The fields that every choice has. Other fields are the engine's own; each is sent once.
STANDARD_FIELDS = frozenset({"delta", "message", "text", "logprobs", "finish_reason"})
# The fields of a message that holds calls in place of a text.
CALLS = ("tool_calls", "function_call")
DONE = b"data: [DONE]\n\n"


class ChunkWriter:
    """Writes the chunks of one streamed completion.

    Args:
        request: The request.
        head: The fields `id`, `created` and `model` of each chunk.
        streams_deltas: True if deltas are sent while the engine samples; False if the selected
            candidates are sent when they are known.
        include_usage: Send the usage in a last chunk.
    """

    def __init__(
        self,
        request: Request,
        head: Mapping[str, Any],
        *,
        streams_deltas: bool,
        include_usage: bool,
    ) -> None:
        self._request = request
        self._head = {**head, "object": OBJECTS[request.kind].chunk}
        self._streams_deltas = streams_deltas
        self._include_usage = include_usage
        # The choices whose role was sent.
        self._opened: set[int] = set()
        # The fields of each choice that were sent, beside the standard ones.
        self._sent_fields: dict[int, set[str]] = {}

    def delta(self, delta: Delta) -> bytes:
        """Return a delta of the engine as a chunk."""
        for key in delta.choice.keys() - STANDARD_FIELDS:
            if delta.choice[key] is not None:
                self._sent_fields.setdefault(delta.index, set()).add(key)
        choice = {"index": delta.index, "logprobs": None, "finish_reason": None, **delta.choice}
        return self._role(delta.index, delta_of(delta.choice)) + self._chunk(choice)

    def error(self, error: AlignError) -> bytes:
        """Return an error that ends the stream."""
        return _event(error_json(error))

    def ending(self, responses: Sequence[Response]) -> bytes:
        """Return the last chunks: selected candidates, finish reasons, report and usage."""
        returned = list(enumerate(returned_candidates(responses)))
        extra = dict(returned[0][1].response_fields)
        extra.pop("usage", None)
        if has_report(self._request):
            extra["align"] = report_json(responses)
        events = []
        if not self._streams_deltas:
            for index, candidate in returned:
                events.append(self._candidate(index, candidate))
        for index, candidate in returned:
            is_last = index == len(returned) - 1
            # The report stands in the last chunk of the stream, as do the engine's other fields.
            chunk_extra = extra if is_last and not self._include_usage else {}
            events.append(self._role(index, candidate.choice.get("message") or {}))
            events.append(self._chunk(self._final_choice(index, candidate), **chunk_extra))
        if self._include_usage:
            events.append(self._chunk(None, usage=total_usage_json(responses), **extra))
        return b"".join(events) + DONE

    def _role(self, index: int, message: Mapping[str, Any]) -> bytes:
        """Return the first chunk of a choice, with its role; empty if it was sent.

        Args:
            index: The index of the choice.
            message: What is sent of the message next. If it begins with a call, the content is
                null, as OpenAI sends it: readers that join the deltas then have no empty text.
        """
        if self._request.kind == "completion" or index in self._opened:
            return b""
        self._opened.add(index)
        is_call = not message.get("content") and any(message.get(name) for name in CALLS)
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": None if is_call else ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return self._chunk(choice)

    def _candidate(self, index: int, candidate: Candidate) -> bytes:
        """Return a complete candidate as one chunk, with all fields of the engine."""
        choice = {key: value for key, value in candidate.choice.items() if key != "message"}
        choice["finish_reason"] = None
        message: Mapping[str, Any] = {}
        if self._request.kind == "chat":
            message = candidate.choice["message"]
            choice["delta"] = message_delta(message)
        return self._role(index, message) + self._chunk({"index": index, **choice})

    def _final_choice(self, index: int, candidate: Candidate) -> dict[str, Any]:
        """Return the choice of a last chunk: empty, except for what was not sent before."""
        choice: dict[str, Any] = {"index": index}
        if self._request.kind == "chat":
            choice["delta"] = {}
        else:
            choice["text"] = ""
        choice["logprobs"] = None
        choice["finish_reason"] = candidate.finish_reason
        if self._streams_deltas:
            # Fields that the engine adds at the end, such as vLLM's stop_reason.
            sent = STANDARD_FIELDS | self._sent_fields.get(index, set())
            for key, value in candidate.choice.items():
                if key not in sent:
                    choice[key] = value
        return choice

    def _chunk(self, choice: Mapping[str, Any] | None, **extra: object) -> bytes:
        chunk = {**self._head, "choices": [] if choice is None else [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return _event({**chunk, **extra})


def _event(data: object) -> bytes:
    return b"data: " + dumps(data) + b"\n\n"
