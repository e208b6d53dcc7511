"""Read OpenAI's `stream` and `stream_options`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from infer_align.config.schema import parse
from infer_align.errors import InvalidRequest, shown


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """OpenAI's `stream_options`."""

    include_usage: bool = field(
        default=False, metadata={"description": "a last chunk with the usage of the whole answer"}
    )
    include_obfuscation: Literal[False] = field(
        default=False, metadata={"description": "padding: nothing here adds any"}
    )


def stream_options(body: Mapping[str, Any]) -> StreamOptions | None:
    """How the answer is to be streamed; None where it is not.

    Raises:
        InvalidRequest: `stream` or `stream_options` is not what it should be.
    """
    stream, options = body.get("stream"), body.get("stream_options")
    if not isinstance(stream, bool | None):
        raise InvalidRequest(
            f"stream: {shown(stream)} is not allowed; must be true or false.", param="stream"
        )
    if options is not None and not stream:
        raise InvalidRequest(
            "stream_options: only allowed where stream is true; leave it out.",
            param="stream_options",
        )
    return (
        parse(StreamOptions, {} if options is None else options, "stream_options")
        if stream
        else None
    )
