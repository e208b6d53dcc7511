"""What goes over the wire: bodies in, OpenAI objects and errors out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, NoReturn

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse

from infer_align.errors import AlignError, BodyTooLarge, InvalidRequest, shown
from infer_align.objectives import std
from infer_align.types import Candidate, Kind, Request, Response

OBJECTS: dict[Kind, tuple[str, str, str]] = {  # id prefix, object of an answer, object of a chunk
    "chat": ("chatcmpl", "chat.completion", "chat.completion.chunk"),
    "completion": ("cmpl", "text_completion", "text_completion"),
}

MAX_QUOTED = 800  # characters of an error's message
MAX_NESTING = 128  # levels of a body; what people send has a dozen
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


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


def dumps(value: object) -> bytes:
    """Compact JSON; NaN and infinity, which JSON lacks, are an error here and must be None by now."""
    return _encode(value).encode()


def json_response(
    value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> HttpResponse:
    """A JSON answer."""
    return HttpResponse(dumps(value), status, headers, "application/json")


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


def completion_json(
    response: Response, request: Request, head: Mapping[str, Any]
) -> dict[str, Any]:
    """The answer of one request; `head` holds id, created and model."""
    body: dict[str, Any] = {
        **response.returned[0].response_fields,
        **head,
        "object": OBJECTS[request.kind][1],
        "choices": [
            {"index": i, **candidate.choice} for i, candidate in enumerate(response.returned)
        ],
        "usage": usage_json(response),
    }
    if request.aligned and request.details != "none":
        body["align"] = align_json(response, request)
    return body


def usage_json(response: Response) -> dict[str, Any]:
    """Each distinct prompt once, everything generated, and which part of it was returned."""
    generated = sum(c.completion_tokens for c in response.candidates)
    returned = sum(c.completion_tokens for c in response.returned)
    return {
        "prompt_tokens": response.prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": response.prompt_tokens + generated,
        "completion_tokens_details": {
            **_details(response, "completion_tokens_details", generated),
            "accepted_prediction_tokens": returned,
            "rejected_prediction_tokens": generated - returned,
        },
        **(
            {"prompt_tokens_details": prompt}
            if (prompt := _details(response, "prompt_tokens_details", response.prompt_tokens))
            else {}
        ),
    }


def _details(response: Response, name: str, most: int) -> dict[str, int]:
    """What the engine's own usage tells apart, over all candidates; never more than the whole of which it is a part."""
    found: dict[str, int] = {}
    for candidate in response.candidates:
        usage = candidate.response_fields.get("usage")
        details = usage.get(name) if isinstance(usage, Mapping) else None
        for key, tokens in (details or {}).items():
            if isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 0:
                found[key] = min(most, found.get(key, 0) + tokens)
    return found


def align_json(response: Response, request: Request) -> dict[str, Any]:
    """What was drawn, how it scored, what was chosen and why."""
    selection, timing, direction = response.selection, response.timing, response.plan.direction
    extra: dict[str, Any] = {} if direction is None else {"direction": dict(direction)}
    if response.scores.reports:
        extra["reports"] = {name: dict(report) for name, report in response.scores.reports.items()}
    return {
        "methods": list(response.plan.methods),
        "selected": selection.ranking[0],
        "dropped": len(selection.dropped),
        "partial": response.partial,
        "reason": selection.reason,
        **extra,
        "candidates": [
            _candidate_json(candidate, response, request) for candidate in response.candidates
        ],
        "usage": {
            "engine_calls": sum(c.calls for c in response.candidates),
            "candidate_tokens": sum(c.completion_tokens for c in response.candidates),
            "saved_tokens": response.saved_tokens,
            **asdict(response.scores.spent),
        },
        "timing": {
            "generate_seconds": round(timing.generate_seconds, 6),
            "score_seconds": round(timing.score_seconds, 6),
            "total_seconds": round(timing.total_seconds, 6),
        },
    }


def _candidate_json(candidate: Candidate, response: Response, request: Request) -> dict[str, Any]:
    index = candidate.index
    direction = response.plan.draws[candidate.draw].direction
    described: dict[str, Any] = {
        "index": index,
        "objective": number(response.selection.objective[index]),
        "scores": scores_json(response, index),
        "direction": None if direction is None else dict(direction),
        "finish_reason": candidate.finish_reason,
        "completion_tokens": candidate.completion_tokens,
        "error": response.selection.dropped.get(index),
    }
    if request.details == "candidates":
        described["choice"] = dict(candidate.choice)
    return described


def scores_json(response: Response, index: int) -> dict[str, Any]:
    """Every reward's view of one candidate: its score, the members behind it, and how far they disagree."""
    scores: dict[str, Any] = {}
    for name, members in response.scores.members.items():
        column = members[:, [index]]
        scores[name] = {
            "value": number(response.selection.values[name][index]),
            "std": number(std(column)[0]),
            "members": [number(value) for value in column[:, 0].tolist()],
        }
        if note := response.scores.notes[name][index]:
            scores[name]["note"] = note
    return scores


def number(value: float) -> float | None:
    """A JSON number; not scored is null."""
    return float(value) if math.isfinite(value) else None
