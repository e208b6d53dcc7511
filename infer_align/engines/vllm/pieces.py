"""A streamed choice of vLLM, assembled from its chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infer_align.decoding.stream import ChoiceBuilder
from infer_align.types import Kind


class Pieces:
    """Assembles the chunks of one choice, as vLLM streams them.

    Attributes:
        usage: vLLM's own count, after the last chunk.
    """

    def __init__(self, kind: Kind) -> None:
        self._builder = ChoiceBuilder(kind)
        self.usage: dict[str, int] = {"prompt_tokens": 0, "completion_tokens": 0}

    def add(self, chunk: Mapping[str, Any]) -> dict[str, Any] | None:
        """Merge a chunk; return the delta for the client, or None if it adds nothing.

        The reasons why the choice ended are reported with the finished choice, not here.
        """
        self.usage = chunk.get("usage") or self.usage
        if not chunk.get("choices"):
            return None
        choice = {key: value for key, value in chunk["choices"][0].items() if value is not None}
        piece = dict(self._builder.merge_chunk(choice))
        piece.pop("stop_reason", None)
        has_text = bool(piece.get("delta") or piece.get("text"))
        return piece if has_text or len(piece) > 1 else None

    @property
    def choice(self) -> dict[str, Any]:
        """The choice so far, with the fields that vLLM's own answers always have."""
        choice = {"stop_reason": None, **self._builder.choice()}
        if self._builder.kind == "chat":
            choice["message"] = {"reasoning": None, **choice["message"]}
        return choice
