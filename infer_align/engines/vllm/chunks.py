"""The stream of one choice: vLLM's server-sent events, parsed to chunks and assembled."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from infer_align.decoding.stream import ChoiceBuilder
from infer_align.types import ANSWER_FIELDS, Kind
from infer_align.upstream.sse import EventParser, is_done
from infer_align.vllm.interfaces import error_from_json


async def parse_chunks(events: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    """Parse vLLM's server-sent events.

    Raises:
        AlignError: a chunk reports an error.
    """
    parser = EventParser()
    async for event in events:
        for data in parser.feed(event.encode()):
            if is_done(data):
                continue
            chunk: dict[str, Any] = json.loads(data)
            if chunk.get("error"):
                raise error_from_json(chunk["error"])
            yield chunk


class StreamedChoice:
    """Assembles the chunks of one choice.

    Attributes:
        usage: vLLM's token counts, complete after the last chunk.
        fields: what stands beside the choice, such as system_fingerprint.
    """

    def __init__(self, kind: Kind) -> None:
        self._builder = ChoiceBuilder(kind)
        self.usage: Mapping[str, Any] = {"prompt_tokens": 0, "completion_tokens": 0}
        self.fields: dict[str, Any] = {}

    def add(self, chunk: Mapping[str, Any]) -> dict[str, Any] | None:
        """Merge a chunk; return the delta for the client, or None if it adds nothing.

        The reasons why the choice ended are reported with the finished choice, not here.
        """
        self.usage = chunk.get("usage") or self.usage
        for key, value in chunk.items():
            if key not in ANSWER_FIELDS and value is not None:
                self.fields[key] = value
        if not chunk.get("choices"):
            return None
        fields = {key: value for key, value in chunk["choices"][0].items() if value is not None}
        delta = dict(self._builder.merge_chunk(fields))
        delta.pop("stop_reason", None)
        has_text = bool(delta.get("delta") or delta.get("text"))
        return delta if has_text or len(delta) > 1 else None

    @property
    def choice(self) -> dict[str, Any]:
        """Return the choice so far, with the fields that vLLM's own answers always have."""
        choice = {"stop_reason": None, **self._builder.choice()}
        if self._builder.kind == "chat":
            choice["message"] = {"reasoning": None, **choice["message"]}
        return choice
