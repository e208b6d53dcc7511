"""Write JSON: compact, with null for NaN and infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from starlette.responses import Response as HttpResponse

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def dumps(value: object) -> bytes:
    """Compact JSON; NaN and infinity, which JSON lacks, are an error here and must be None by now."""
    return _encode(value).encode()


def json_response(
    value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> HttpResponse:
    """A JSON answer."""
    return HttpResponse(dumps(value), status, headers, "application/json")


def number(value: float) -> float | None:
    """A JSON number; not scored is null."""
    return float(value) if math.isfinite(value) else None
