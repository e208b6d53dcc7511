"""Structured logs: one JSON object per line, on standard error.

The package python-json-logger does not fit: it does not remove secrets from the finished line.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime

# The attributes of every LogRecord. All others are the `extra` of one event.
_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "color_message",
    "taskName",
}
REDACTED = "[redacted]"
_BEARER = re.compile(r"(?i)\b(bearer)\s+[^\s\"'\\]+")


class JsonFormatter(logging.Formatter):
    """Formats a record and its `extra` fields as one line of JSON, without secrets.

    Args:
        secrets: Strings that are replaced wherever they occur, such as API keys.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        escaped = {json.dumps(secret)[1:-1] for secret in secrets if secret}
        # The longest first: one secret may be the beginning of another.
        self._secrets = sorted(escaped, key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON."""
        event = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        for key, value in vars(record).items():
            if key not in _STANDARD_ATTRIBUTES:
                event[key] = value
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        line = json.dumps(event, default=str)
        for secret in self._secrets:
            line = line.replace(secret, REDACTED)
        return _BEARER.sub(rf"\1 {REDACTED}", line)


class AccessLogger(logging.Logger):
    """A logger that does not look up the caller's line: that is a third of a record's cost."""

    def findCaller(self, *_: object, **__: object) -> tuple[str, int, str, None]:  # noqa: N802
        """Return an empty location."""
        return "", 0, "", None


access = AccessLogger("infer_align.access")


def configure(level: str, secrets: Iterable[str] = ()) -> None:
    """Send our logs and uvicorn's to standard error.

    Progress bars of downloads are switched off unless standard error is a terminal.

    Args:
        level: The level of our logs, such as "info".
        secrets: See `JsonFormatter`.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(secrets))
    levels = {
        logging.getLogger("infer_align"): level.upper(),
        access: level.upper(),
        logging.getLogger("uvicorn.error"): "WARNING",
    }
    for logger, minimum in levels.items():
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(minimum)
