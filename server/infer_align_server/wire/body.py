"""Read request bodies: a bounded number of bytes, as one JSON object."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NoReturn

from starlette.requests import Request as HttpRequest

from infer_align.errors import BodyTooLarge, InvalidRequest, shown

MAX_NESTING = 128  # levels of a body; what people send has a dozen


async def read_body(http: HttpRequest, max_bytes: int) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        BodyTooLarge, InvalidRequest: see `read_bytes` and `parse_body`.
    """
    return parse_body(await read_bytes(http, max_bytes))


async def read_bytes(http: HttpRequest, max_bytes: int) -> bytes:
    """The body as it came.

    Raises:
        BodyTooLarge: over `max_bytes`, said before it is read where the client announces its size.
    """
    announced = http.headers.get("content-length", "0")
    received = bytearray()
    if not announced.isdecimal() or int(announced) <= max_bytes:
        async for chunk in http.stream():
            received += chunk
            if len(received) > max_bytes:
                break
    if len(received) > max_bytes or (announced.isdecimal() and int(announced) > max_bytes):
        raise BodyTooLarge(f"the body is over this server's limit of {max_bytes} bytes; send less.")
    return bytes(received)


def parse_body(received: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InvalidRequest: not JSON, not an object, or text that is not Unicode.
    """
    try:
        body = json.loads(received.decode(), parse_constant=_no_constant, parse_float=_finite)
        if b"\\u" in received:  # only an escape can smuggle in half a surrogate pair
            json.dumps(body, ensure_ascii=False).encode()
        _check_nesting(body)
    except _TooLarge:
        where = _overflow(received)
        raise InvalidRequest(
            f"{where or 'the body'}: holds a number that is larger than any here.", param=where
        ) from None
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the body holds text that is not Unicode: {error.reason}; escape whole surrogate pairs."
        ) from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise InvalidRequest(
            f"the body is {shown(body)}; must be a JSON object.", code="invalid_json"
        )
    return body


def _check_nesting(body: object) -> None:
    """Deeper than this, what quotes or writes the body again could run out of stack."""
    level = [body]
    for _ in range(MAX_NESTING):
        level = [
            child for value in level if isinstance(value, dict | list) for child in _children(value)
        ]
        if not level:
            return
    raise RecursionError(f"nested deeper than {MAX_NESTING} levels")


def _children(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


class _TooLarge(Exception):
    """A number that overflows: as infinity it would pass every comparison, and no JSON could carry it on."""


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _TooLarge
    return number


def _overflow(received: bytes) -> str | None:
    try:
        body = json.loads(received)
        _check_nesting(body)
    except RecursionError:
        return None
    return _infinite(body)


def _infinite(value: object, path: str = "") -> str | None:
    """Where in a body an infinite number stands."""
    if isinstance(value, dict):
        inside = ((f"{path}.{key}" if path else key, child) for key, child in value.items())
    elif isinstance(value, list):
        inside = ((f"{path}[{i}]", child) for i, child in enumerate(value))
    else:
        return path if isinstance(value, float) and math.isinf(value) else None
    return next((found for where, child in inside if (found := _infinite(child, where))), None)
