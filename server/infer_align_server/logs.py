"""Structured logs: one JSON object a line, on standard error."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime

# What every LogRecord has; the rest was given as `extra` and is the event's own.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "color_message",
    "taskName",
}


REDACTED = "[redacted]"
_BEARER = re.compile(r"(?i)\b(bearer)\s+[^\s\"'\\]+")


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON, with whatever was given as `extra`; keys do not get into it, whoever put them there."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        # As they stand in JSON, the longest first: one may be the beginning of another.
        self._secrets = sorted(
            {json.dumps(secret)[1:-1] for secret in secrets if secret}, key=len, reverse=True
        )

    def format(self, record: logging.LogRecord) -> str:
        """Render it."""
        event = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **{key: value for key, value in vars(record).items() if key not in _STANDARD},
        }
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        line = json.dumps(event, default=str)
        for secret in self._secrets:
            line = line.replace(secret, REDACTED)
        return _BEARER.sub(rf"\1 {REDACTED}", line)


class AccessLogger(logging.Logger):
    """One line per request: where in the code it was written is not looked up, which is a third of a line's cost."""

    def findCaller(self, *_: object, **__: object) -> tuple[str, int, str, None]:  # noqa: N802 - logging's name
        """Nowhere."""
        return "", 0, "", None


access = AccessLogger("infer_align.access")


def configure(level: str, secrets: Iterable[str] = ()) -> None:
    """Send our logs and uvicorn's to standard error, without `secrets`; progress bars of model files only to a terminal."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(secrets))
    loggers = (
        (logging.getLogger("infer_align"), level.upper()),
        (access, level.upper()),
        (logging.getLogger("uvicorn.error"), "WARNING"),
    )
    for logger, minimum in loggers:
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(minimum)
