"""Structured logs: one JSON object per line, on standard error.

The package python-json-logger does not fit: it does not remove secrets from the finished line.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime

from infer_align.types import Candidate

# The attributes of every LogRecord. All others are the `extra` of one event.
_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "color_message",
    "taskName",
}
REDACTED = "[redacted]"
# Libraries that install handlers of their own.
LIBRARIES = ("transformers", "huggingface_hub")
_BEARER = re.compile(r"(?i)\b(bearer)\s+[^\s\"'\\]+")


class JsonFormatter(logging.Formatter):
    """Formats a record and its `extra` fields as one line of JSON, without secrets.

    Args:
        secrets: Strings that are replaced wherever they occur, such as API keys.
        worker: The process id of a worker, for each of its lines; None if there is one process.
    """

    def __init__(self, secrets: Iterable[str] = (), worker: int | None = None) -> None:
        super().__init__()
        self._fields = {} if worker is None else {"worker": worker}
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
            **self._fields,
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


# The fields of the access line of the running request, which its parts fill in.
access_fields: ContextVar[dict[str, object] | None] = ContextVar("access_fields", default=None)


def describe(**fields: object) -> None:
    """Add fields to the access line of the running request, if there is one."""
    line = access_fields.get()
    if line is not None:
        line.update(fields)


def describe_usage(candidates: Sequence[Candidate], prompt_tokens: int | None = None) -> None:
    """Add the tokens that were spent on candidates to the access line.

    Args:
        candidates: The candidates.
        prompt_tokens: The tokens of all prompts; None if the candidates have one prompt.
    """
    if prompt_tokens is None:
        prompt_tokens = max((each.prompt_tokens for each in candidates), default=0)
    describe(
        candidates=len(candidates),
        prompt_tokens=prompt_tokens,
        completion_tokens=sum(each.completion_tokens for each in candidates),
    )


class RequestIdFilter(logging.Filter):
    """Adds the id of the running request to events that are logged while it is handled."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the id, and let every record pass."""
        line = access_fields.get()
        if line is not None and not hasattr(record, "request_id"):
            record.request_id = line["request_id"]
        return True


class AccessLogger(logging.Logger):
    """A logger that does not look up the caller's line: that is a third of a record's cost."""

    def findCaller(self, *_: object, **__: object) -> tuple[str, int, str, None]:  # noqa: N802
        """Return an empty location."""
        return "", 0, "", None


access = AccessLogger("infer_align.access")


def configure(level: str, secrets: Iterable[str] = (), worker: int | None = None) -> None:
    """Send the logs of every package and Python's warnings to standard error.

    Args:
        level: The level of our logs, such as "info".
        secrets: See `JsonFormatter`.
        worker: See `JsonFormatter`.
    """
    # No line has them, and looking them up is half the cost of a record.
    logging.logThreads = False
    logging.logProcesses = False
    logging.logMultiprocessing = False
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(secrets, worker))
    handler.addFilter(RequestIdFilter())
    # Libraries log to the root. Their own handlers would write plain lines.
    logging.getLogger().handlers = [handler]
    logging.captureWarnings(capture=True)
    for library in LIBRARIES:
        logging.getLogger(library).handlers = []
        logging.getLogger(library).propagate = True
    levels = {
        logging.getLogger("infer_align"): level.upper(),
        access: level.upper(),
        logging.getLogger("uvicorn.error"): "WARNING",
    }
    for logger, minimum in levels.items():
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(minimum)


def switch_off_progress_bars() -> None:
    """Switch off the bars of downloads and of loading, unless standard error is a terminal.

    A log holds lines, not bars. The libraries read these variables when they are imported, so this
    has to run before.
    """
    if not sys.stderr.isatty():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
            os.environ.setdefault(name, "1")
