"""Reading of request bodies: a bounded number of bytes that contain one JSON object."""

from __future__ import annotations

import json
import math
import sys
from codecs import BOM_UTF8
from collections.abc import Mapping
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from infer_align.errors import BodyTooLarge, InvalidRequest, quote
from infer_align_server.wire.headers import headers_of

# Maximum nesting of a body. Usual bodies have about a dozen levels.
MAX_NESTING = 128


async def read_body(http: HttpRequest, max_bytes: int) -> dict[str, Any]:
    """Return the body of a request as a JSON object.

    Raises:
        BodyTooLarge: The body is larger than `max_bytes`.
        InvalidRequest: See `parse_body`.
    """
    return parse_body(await read_bytes(http, max_bytes))


async def read_bytes(http: HttpRequest, max_bytes: int) -> bytes:
    """Return the body of a request as bytes.

    Raises:
        BodyTooLarge: The body is larger than `max_bytes`. A body whose Content-Length says so is
            not read.
        ClientDisconnect: The client left before the end of the body.
    """
    if content_length(headers_of(http)) > max_bytes:
        raise _too_large(max_bytes)
    received = bytearray()
    is_complete = False
    while not is_complete:
        message = await http.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        received += message.get("body", b"")
        if len(received) > max_bytes:
            raise _too_large(max_bytes)
        is_complete = not message.get("more_body", False)
    return bytes(received)


def content_length(headers: Mapping[str, str]) -> int:
    """Return the size of the body that a request announces, in bytes; 0 if it announces none."""
    length = headers.get("content-length", "0")
    return int(length) if length.isdecimal() else 0


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"The body is over this server's limit of {max_bytes} bytes; send a smaller one."
    )


def parse_body(received: bytes) -> dict[str, Any]:
    """Return a body as a JSON object. A byte order mark before it is skipped.

    Raises:
        InvalidRequest: The body is not JSON, not an object, nested too deeply, or contains a
            number or text that JSON cannot represent.
    """
    received = received.removeprefix(BOM_UTF8)
    try:
        body = _decode(received.decode())
        _check_unicode(received, body)
        _check_nesting(body)
    except _NumberTooLargeError:
        path = _path_of_number(received)
        raise InvalidRequest(
            f"{path or 'the body'}: contains a number that is too large for a float; "
            "use one below 1.8e308.",
            param=path,
        ) from None
    except _NotJsonError as error:
        path = _path_of_number(received)
        place = f"{path}: " if path else ""
        raise InvalidRequest(
            f"{place}The body is not JSON: {error} is not a JSON number; write a finite number.",
            param=path or None,
            code="invalid_json",
        ) from None
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"The body contains text that is not Unicode: {error.reason}; escape surrogates in "
            "pairs."
        ) from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"The body is not JSON: {_reason(error)}.", code="invalid_json"
        ) from None
    if not isinstance(body, dict):
        raise InvalidRequest(
            f"The body is {quote(body)}; must be a JSON object.", code="invalid_json"
        )
    return body


def _reason(error: ValueError | RecursionError) -> str:
    """Return why a body could not be read as JSON, and what to send."""
    if isinstance(error, UnicodeDecodeError):
        place = f"its byte {error.start} is not UTF-8"
        return f"{place}; send it in UTF-8, and without compression"
    if isinstance(error, RecursionError):
        return f"it is nested deeper than {MAX_NESTING} levels; send fewer"
    if not isinstance(error, json.JSONDecodeError):
        # Python reads no longer integer.
        return f"it has an integer of over {sys.get_int_max_str_digits()} digits; write fewer"
    return str(error)


def _check_unicode(received: bytes, body: object) -> None:
    """Raise UnicodeEncodeError if the body contains a surrogate without its pair."""
    # Only an escape can encode one.
    if b"\\u" in received:
        json.dumps(body, ensure_ascii=False).encode()


def _check_nesting(body: object) -> None:
    """Raise RecursionError if a body is nested so deeply that writing it may overflow the stack."""
    level: list[object] = [body]
    for _ in range(MAX_NESTING):
        containers = [value for value in level if isinstance(value, dict | list)]
        level = []
        for container in containers:
            level.extend(container.values() if isinstance(container, dict) else container)
        if not level:
            return
    raise RecursionError


def _no_constant(name: str) -> NoReturn:
    raise _NotJsonError(name)


class _NotJsonError(Exception):
    """The name of a number that JSON does not have: NaN, Infinity or -Infinity."""


class _NumberTooLargeError(Exception):
    """A number became infinite.

    Infinity would pass every comparison with a minimum, and JSON cannot represent it.
    """


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _NumberTooLargeError
    return number


# json.loads would make a decoder for each body.
_decode = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite).decode


def _path_of_number(received: bytes) -> str | None:
    try:
        body = json.loads(received)
        _check_nesting(body)
    # The rest of the body may be no JSON.
    except (RecursionError, ValueError):
        return None
    return _path_of_not_finite(body)


def _path_of_not_finite(value: object, path: str = "") -> str | None:
    """Return the dotted path of the first number that is not finite; None if there is none."""
    children: dict[str, object] = {}
    if isinstance(value, dict):
        prefix = f"{path}." if path else ""
        children = {f"{prefix}{key}": child for key, child in value.items()}
    elif isinstance(value, list):
        children = {f"{path}[{i}]": child for i, child in enumerate(value)}
    elif isinstance(value, float) and not math.isfinite(value):
        return path
    for child_path, child in children.items():
        match = _path_of_not_finite(child, child_path)
        if match is not None:
            return match
    return None
