"""The base of all errors, the errors that several parts raise, and their form on the wire.

    AlignError
    ├── InvalidRequest      400  a field of the request is wrong
    │   └── Unsupported     400  well-formed, but this engine or server cannot honour it
    ├── Unauthorized        401  the API key is missing or not accepted
    ├── Forbidden           403  the API key lacks the scope of the route
    ├── UnknownModel        404  there is no such model or preset
    ├── BodyTooLarge        413  the body is over `[limits] max_body_bytes`
    ├── RewardFailed        424  no candidate could be scored; a retry would draw all of them again
    ├── Overloaded          429  over a queue or rate limit; carries `retry_after` seconds
    ├── EngineFailed        502  the engine (or its upstream) failed every candidate
    ├── Unavailable         503  loading, shutting down, or the engine died
    ├── DeadlineExceeded    504  the deadline passed with nothing to return
    └── ConfigError          -   the configuration is wrong; the process does not start

An error of one part stands with that part, such as `UpstreamFailed` in `infer_align.upstream`. The
class sets the status and the code. A single error may replace them: `EngineFailed`, for example,
has the status of its upstream.

A message names the field, its value, what is allowed and how to fix it. `param` is a dotted path
into the request body.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable

# A quoted value is cut after 80 characters, so deeper levels are seldom seen.
_MAX_QUOTED_DEPTH = 8


class AlignError(Exception):
    """Base class of all errors.

    Attributes:
        message: for people.
        code: for programs.
        param: the field of the request, as a dotted path, or None.
        status: the HTTP status.
        retry_after: seconds until a retry makes sense, or None.
        should_retry: False if clients shall not send the request again by themselves; None leaves
            it to the status.
    """

    status = 500
    should_retry: bool | None = None
    type = "server_error"
    code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code
        self.status = status or self.status
        self.retry_after = retry_after


class WrongField(ValueError):
    """A field of a parameter dataclass does not fit the others.

    Parsers name it where the parameters are the body itself.

    Attributes:
        field: its name.
    """

    def __init__(self, field: str, allowed: str) -> None:
        """Keep the name of the field, and what is allowed as a noun phrase."""
        super().__init__(allowed)
        self.field = field


class InvalidRequest(AlignError):
    """400: a field of the request is wrong; `param` names it."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class Unsupported(InvalidRequest):
    """400: the request is well-formed, but this engine or server cannot honour it."""

    code = "unsupported"


class Unauthorized(AlignError):
    """401: the API key is missing or not accepted."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(AlignError):
    """403: the API key lacks the scope that the route needs."""

    status = 403
    type = "permission_error"
    code = "missing_scope"


class UnknownModel(AlignError):
    """404: the model, or the preset in `<model>@<preset>`, does not exist."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class DeadlineExceeded(AlignError):
    """504: the deadline passed before any candidate had produced anything."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class BodyTooLarge(AlignError):
    """413: the request body is over the configured size."""

    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class Overloaded(AlignError):
    """429: over a limit; retry after `retry_after` seconds."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class EngineFailed(AlignError):
    """502, or the status of the engine's upstream: every candidate failed.

    An upstream's 429 becomes a rate limit error for the client too, so that its SDK retries.
    """

    status = 502
    code = "engine_failed"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        rate_limited = status == Overloaded.status
        if rate_limited and code is None:
            code = Overloaded.code
        super().__init__(message, param=param, code=code, status=status, retry_after=retry_after)
        if rate_limited:
            self.type = Overloaded.type


class RewardFailed(AlignError):
    """424: a selection was requested and no candidate could be scored.

    SDKs repeat a 5xx by themselves. That would draw every candidate again, and mostly fail again.
    """

    status = 424
    should_retry = False
    code = "reward_failed"


class Unavailable(AlignError):
    """503: the server is loading or draining, or its engine has died."""

    status = 503
    code = "unavailable"


class ConfigError(AlignError):
    """The configuration is wrong; the message names the key and the file."""

    code = "invalid_config"


def nearest(word: str, names: Iterable[str]) -> str:
    """Return a closing clause for a message about an unknown name.

    It suggests the most similar of the allowed names, or lists all of them.
    """
    allowed = sorted(names)
    # A client's word can be megabytes long, so only its beginning is compared.
    similar = difflib.get_close_matches(word[:80], allowed, n=1)
    if similar:
        return f"did you mean {similar[0]!r}?"
    return "known: " + (", ".join(allowed) or "none") + "."


def field_path(*names: str) -> str:
    """Return the dotted path of a field, as a message begins with it. An empty name is quoted."""
    return ".".join(name or '""' for name in names)


def quote(value: object) -> str:
    """Return `value` as a message quotes it: recognisable, but never a whole body.

    None and the booleans have their names in JSON, also within lists and objects.
    """
    text = _text(value, _MAX_QUOTED_DEPTH)
    return text if len(text) <= 80 else text[:77] + "..."


def _text(value: object, depth: int) -> str:
    """Return the text of a value; what lies deeper than `depth` is written as Python does."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    # A tuple or an object of another type comes from a program, not from a body.
    if type(value) is list and depth:
        return f"[{', '.join(_text(item, depth - 1) for item in value)}]"
    if type(value) is dict and depth:
        pairs = [f"{key!r}: {_text(item, depth - 1)}" for key, item in value.items()]
        return f"{{{', '.join(pairs)}}}"
    return repr(value)
