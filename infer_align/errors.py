"""Every error that a person can meet, and what it says on the wire.

    AlignError
    ├── InvalidRequest      400  a field of the request: named, with what is allowed
    │   └── Unsupported     400  well-formed, but this engine or server cannot honour it
    ├── Unauthorized        401  no key, or one that is not known
    ├── UnknownModel        404  no such model or preset
    ├── DeadlineExceeded    504  the deadline passed with nothing to answer
    ├── BodyTooLarge        413  the body is over `[limits] max_body_bytes`
    ├── Overloaded          429  queue or rate limit; carries `retry_after` seconds
    ├── EngineFailed        502  the engine (or its upstream) failed every candidate
    ├── RewardFailed        502  no candidate could be scored
    ├── Unavailable         503  still loading, shutting down, or the engine died
    └── ConfigError          -   the configuration; the process does not start

A message names the field, the value, what is allowed and how to mend it. `param` is a dotted path into the body.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AlignError(Exception):
    """Base of the tree: `message` for people, `code` for programs, `param` for the field, `status` for HTTP."""

    status = 500
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


class InvalidRequest(AlignError):
    """400: one field of the request is wrong; `param` names it."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class Unsupported(InvalidRequest):
    """400: understood, but not something this engine or server can do."""

    code = "unsupported"


class Unauthorized(AlignError):
    """401: the API key is missing or unknown."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class UnknownModel(AlignError):
    """404: the model, or the preset in `<model>@<preset>`, does not exist."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class DeadlineExceeded(AlignError):
    """504: the deadline passed and no candidate had produced anything."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class BodyTooLarge(AlignError):
    """413: the request body is over the configured size."""

    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class Overloaded(AlignError):
    """429: come back after `retry_after` seconds."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class EngineFailed(AlignError):
    """502 unless the engine knows better: every candidate failed; the first failure's message is kept.

    An upstream's 429 is one to the client too, whose SDK then knows what to do.
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
        over = status == Overloaded.status
        code = code or (Overloaded.code if over else None)
        super().__init__(message, param=param, code=code, status=status, retry_after=retry_after)
        if over:
            self.type = Overloaded.type


class RewardFailed(AlignError):
    """502: a selection was asked for and no candidate could be scored."""

    status = 502
    code = "reward_failed"


class Unavailable(AlignError):
    """503: loading, draining, or the engine has died."""

    status = 503
    code = "unavailable"


class ConfigError(AlignError):
    """The configuration is wrong; names the key and where it was read."""

    code = "invalid_config"


def nearest(word: str, known: Iterable[str]) -> str:
    """A closing clause for a message about an unknown name: the nearest known one, else all of them."""
    known = sorted(known)
    if close := difflib.get_close_matches(
        word[:80], known, n=1
    ):  # a client's word can be megabytes long
        return f"did you mean {close[0]!r}?"
    return "known: " + (", ".join(known) or "none") + "."


def shown(value: object) -> str:
    """`value` as a message quotes it: enough to recognise it, never a whole body."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
