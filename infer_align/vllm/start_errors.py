"""The reason why an engine of vLLM does not start.

The reason is an exception in one of vLLM's processes, which logs it. The exception in this process
says only that another process has ended. So vLLM's logging gets one more handler while an engine
starts: it writes the first exception of all processes to a file, which is read here.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from infer_align.errors import ConfigError
from infer_align.vllm.interfaces import VllmConfig
from infer_align.vllm.log import LOGGER

MAX_LENGTH = 600
# The exit codes of the processes stand in vLLM's own message; -9 is a process that was killed.
_KILLED = re.compile(r"proc\(s\): \{.*: -9\b")


class FirstErrorHandler(logging.Handler):
    """Writes the first exception that any process logs to a file.

    Args:
        path: The file. It must not exist yet.
    """

    def __init__(self, path: str) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        """Write the exception of a record, unless another process was first."""
        error = record.exc_info[1] if record.exc_info else None
        # After the start there is no such folder any more.
        if error is not None:
            with suppress(OSError), open(self._path, "x", encoding="utf-8") as file:
                file.write(_describe(error))


def _describe(error: BaseException) -> str:
    """Return an exception as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:MAX_LENGTH]


@contextmanager
def explained(config: VllmConfig, section: str) -> Iterator[None]:
    """Give a failed start its reason. `config` is that of the engine that starts in the block.

    Raises:
        ConfigError: The block raised any other exception than this.
    """
    with tempfile.TemporaryDirectory(prefix="infer-align-") as folder:
        record = Path(folder) / "error"
        try:
            with _recorded(config, record):
                yield
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{section} vLLM could not start: {_reason(error, record)}"
            ) from error


def _reason(error: Exception, record: Path) -> str:
    with suppress(OSError):
        first = record.read_text(encoding="utf-8")
        return (
            f"{first.rstrip('.')}. Correct the options or the files of the model; the traceback is "
            "in its log above."
        )
    if _KILLED.search(str(error)):
        return (
            "one of its processes was killed, probably because there was not enough memory; free "
            "memory, or set max_model_len, max_num_seqs or kv_cache_memory_bytes to less."
        )
    return f"{_describe(error).rstrip('.')}; see its log above for the cause."


@contextmanager
def _recorded(config: VllmConfig, record: Path) -> Iterator[None]:
    """Have the processes of an engine write their first exception to a file, if all run here."""
    logging_config = config.logging_config
    parallel = config.parallel_config
    is_local = parallel.nnodes == 1 and parallel.distributed_executor_backend != "ray"
    has_all_ranks = parallel.data_parallel_size == parallel.data_parallel_size_local
    is_text = logging_config.pylogging_config_file or logging_config.formatter == "text"
    is_logged = logging_config.configure_logging and is_text
    if not (is_logged and is_local and has_all_ranks):
        yield
        return
    file = record.with_name("logging.json")
    file.write_text(json.dumps(_with_handler(logging_config, record)), encoding="utf-8")
    config.logging_config = replace(logging_config, pylogging_config_file=str(file))
    try:
        yield
    finally:
        config.logging_config = logging_config


def _with_handler(logging_config: Any, record: Path) -> dict[str, Any]:
    """Return a configuration of Python's logging with one more handler for vLLM's logger."""
    settings = _settings(logging_config)
    loggers = settings.setdefault("loggers", {})
    logger = loggers.setdefault(LOGGER, {})
    name = "infer_align_first_error"
    factory = f"{FirstErrorHandler.__module__}.{FirstErrorHandler.__name__}"
    settings.setdefault("handlers", {})[name] = {"()": factory, "path": str(record)}
    logger["handlers"] = [*logger.get("handlers", ()), name]
    return settings


def _settings(logging_config: Any) -> dict[str, Any]:
    """Return the settings that vLLM would use: those of a file, or its own."""
    if logging_config.pylogging_config_file:
        text = Path(logging_config.pylogging_config_file).read_text(encoding="utf-8")
        from_file: dict[str, Any] = json.loads(text)
        return from_file
    # vLLM takes ten seconds to import, and its processes have done so when they import this.
    from vllm.logger import DEFAULT_LOGGING_CONFIG  # noqa: PLC0415

    settings: dict[str, Any] = deepcopy(DEFAULT_LOGGING_CONFIG)
    settings["handlers"]["vllm"]["level"] = logging_config.log_level
    settings["loggers"]["vllm"]["level"] = logging_config.log_level
    for formatter in settings["formatters"].values():
        formatter["log_level"] = logging_config.log_level
    return settings
