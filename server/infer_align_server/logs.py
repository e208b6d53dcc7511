"""Structured logs: one JSON object per line, on standard error.

The package python-json-logger does not fit: it does not remove secrets from the finished line.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TextIO

from infer_align.types import Candidate

# The attributes of every LogRecord, those of uvicorn and vLLM included. All others are the `extra`
# of one event.
_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "color_message",
    "taskName",
    "vllm_process_name",
    "fileinfo",
}
REDACTED = "[redacted]"
# Libraries that install handlers of their own.
LIBRARIES = ("transformers", "huggingface_hub")
_BEARER = re.compile(r"(?i)\b(bearer)\s+[^\s\"'\\]+")
# json.dumps would make an encoder for each line.
_encode = json.JSONEncoder(default=str).encode


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
        fields: dict[str, object] = {}
        for key, value in vars(record).items():
            if key not in _STANDARD_ATTRIBUTES:
                fields[key] = value
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        level = record.levelname.lower()
        return self.line(record.created, level, record.name, record.getMessage(), fields)

    def line(
        self, seconds: float, level: str, logger: str, event: str, fields: Mapping[str, object]
    ) -> str:
        """Return an event as one line of JSON.

        Args:
            seconds: The time of the event, since the epoch.
            level: Its level in lower case.
            logger: The name of its logger.
            event: What happened.
            fields: What else is known.
        """
        content = {
            "time": datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds"),
            "level": level,
            "logger": logger,
            "event": event,
            **self._fields,
            **fields,
        }
        line = _encode(content)
        for secret in self._secrets:
            line = line.replace(secret, REDACTED)
        # The search for the pattern takes as long as the rest of the line.
        if "bearer" in line.lower():
            line = _BEARER.sub(rf"\1 {REDACTED}", line)
        return line


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


class AccessLog:
    """Writes one line per request, in the form of all other lines.

    The lines of one round of the event loop are written at its end, all at once. A record of
    `logging` for each takes three times as long, a twelfth of the time of a request that is passed
    on. A thread that writes them, as `logging.handlers.QueueListener`, takes turns with the event
    loop for the interpreter and makes the answers slower.
    """

    def __init__(self) -> None:
        self._formatter = JsonFormatter()
        self._stream: TextIO | None = None
        self._lines: list[str] = []

    def open(self, stream: TextIO, formatter: JsonFormatter) -> None:
        """Write to a stream from now on."""
        self._stream = stream
        self._formatter = formatter

    def close(self) -> None:
        """Write nothing from now on."""
        self._stream = None

    def write(self, fields: Mapping[str, object]) -> None:
        """Write the line of one request; called in the event loop."""
        if self._stream is None:
            return
        line = self._formatter.line(time.time(), "info", ACCESS, "request", fields)
        self._lines.append(line)
        if len(self._lines) == 1:
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        lines = "\n".join(self._lines) + "\n"
        self._lines.clear()
        if self._stream is not None:
            # Requests are answered also while the log cannot be written.
            with suppress(OSError, ValueError):
                self._stream.write(lines)
                self._stream.flush()


ACCESS = "infer_align.access"
access = AccessLog()


def configure(level: str, secrets: Iterable[str] = (), worker: int | None = None) -> None:
    """Send the logs of every package and Python's warnings to standard error.

    Args:
        level: The level of our logs, such as "info".
        secrets: See `JsonFormatter`.
        worker: See `JsonFormatter`.
    """
    formatter = JsonFormatter(secrets, worker)
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    handler.addFilter(RequestIdFilter())
    # Libraries log to the root. Their own handlers would write plain lines.
    logging.getLogger().handlers = [handler]
    logging.captureWarnings(capture=True)
    for library in LIBRARIES:
        logging.getLogger(library).handlers = []
        logging.getLogger(library).propagate = True
    levels = {
        logging.getLogger("infer_align"): level.upper(),
        logging.getLogger("uvicorn.error"): "WARNING",
    }
    for logger, minimum in levels.items():
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(minimum)
    if logging.getLogger("infer_align").isEnabledFor(logging.INFO):
        access.open(handler.stream, formatter)
    else:
        access.close()


def switch_off_progress_bars() -> None:
    """Switch off the bars of downloads and of loading, unless standard error is a terminal.

    A log holds lines, not bars. The libraries read these variables when they are imported, so this
    has to run before.
    """
    if not sys.stderr.isatty():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
            os.environ.setdefault(name, "1")
