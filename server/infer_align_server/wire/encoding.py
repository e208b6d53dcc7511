"""Writing of JSON: compact, and with null for NaN and infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from starlette.responses import Response as HttpResponse

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def dumps(value: object) -> bytes:
    """Return a value as compact JSON.

    Raises:
        ValueError: The value contains NaN or infinity; see `number`.
    """
    return _encode(value).encode()


def json_response(
    value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> HttpResponse:
    """Return a response with a value as JSON."""
    return HttpResponse(dumps(value), status, headers, "application/json")


def number(value: float) -> float | None:
    """Return a float for JSON: None, which becomes null, for NaN and infinity."""
    return float(value) if math.isfinite(value) else None
