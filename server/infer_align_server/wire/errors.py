"""Write errors in the shape of OpenAI's API."""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import Response as HttpResponse

from infer_align.errors import AlignError
from infer_align_server.wire.encoding import json_response

MAX_QUOTED = 800  # characters of an error's message


def error_json(error: AlignError) -> dict[str, Any]:
    """OpenAI's error object."""
    param = None if error.param is None else _clipped(error.param)
    return {
        "error": {
            "message": _clipped(error.message),
            "type": error.type,
            "param": param,
            "code": error.code,
        }
    }


def _clipped(text: str) -> str:
    """A name that a client made up may be megabytes long; nobody wants it back."""
    return (
        text
        if len(text) <= MAX_QUOTED
        else f"{text[: MAX_QUOTED // 2]} ... {text[-MAX_QUOTED // 2 :]}"
    )


def error_response(error: AlignError) -> HttpResponse:
    """An error with its own status, and when to come back where that is known."""
    retry = (
        {}
        if error.retry_after is None
        else {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    )
    challenge = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    return json_response(error_json(error), error.status, {**retry, **challenge})
