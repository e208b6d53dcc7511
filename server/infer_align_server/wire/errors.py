"""Errors in the format of OpenAI's API."""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import Response as HttpResponse

from infer_align.errors import AlignError
from infer_align_server.wire.encoding import json_response

# Maximum number of characters of an error's message and `param`. Both may repeat a name from the
# request, which may be megabytes long.
MAX_TEXT = 800


def error_json(error: AlignError) -> dict[str, Any]:
    """Return an error as OpenAI's error object."""
    fields = {
        "message": _shorten(error.message),
        "type": error.type,
        "param": None if error.param is None else _shorten(error.param),
        "code": error.code,
    }
    return {"error": fields}


def _shorten(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    half = MAX_TEXT // 2
    return f"{text[:half]} ... {text[-half:]}"


def error_response(error: AlignError) -> HttpResponse:
    """Return an error as a response with its status, and Retry-After if it is known."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.should_retry is False:
        # OpenAI's SDKs obey this header, whatever the status.
        headers["x-should-retry"] = "false"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(error_json(error), error.status, headers)
