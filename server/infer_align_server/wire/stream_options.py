"""OpenAI's request fields `stream` and `stream_options`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from infer_align.config.schema import parse
from infer_align.errors import InvalidRequest, quote


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """OpenAI's `stream_options`."""

    include_usage: bool = field(
        default=False,
        metadata={"description": "Send a last chunk with the usage of the whole response."},
    )
    include_obfuscation: bool = field(
        default=False,
        metadata={
            "json_schema_extra": {"enum": [False]},
            "description": "Padding of chunks; this server never adds any.",
        },
    )


def stream_options(body: Mapping[str, Any]) -> StreamOptions | None:
    """Return the options of a streamed response; None if it is not streamed.

    Raises:
        InvalidRequest: `stream` or `stream_options` is invalid.
    """
    stream = body.get("stream")
    options = body.get("stream_options")
    if not isinstance(stream, bool | None):
        raise InvalidRequest(
            f"stream: {quote(stream)} is not allowed; must be true or false.", param="stream"
        )
    if stream:
        parsed = parse(StreamOptions, {} if options is None else options, "stream_options")
        if parsed.include_obfuscation:
            raise InvalidRequest(
                "stream_options.include_obfuscation: true is not allowed; must be false: this "
                "server never pads its chunks.",
                param="stream_options.include_obfuscation",
            )
        return parsed
    if options is not None:
        raise InvalidRequest(
            "stream_options: only allowed if stream is true; set stream to true or leave "
            "stream_options out.",
            param="stream_options",
        )
    return None
