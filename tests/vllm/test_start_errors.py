"""The first exception of any of vLLM's processes is the reason of a start that failed."""

from __future__ import annotations

import json
import logging
import logging.config
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from infer_align.errors import ConfigError
from infer_align.vllm.start_errors import explained


@dataclass(frozen=True)
class Logging:
    """The fields of vLLM's `LoggingConfig`."""

    pylogging_config_file: str | None = None
    configure_logging: bool = True
    formatter: str = "text"
    log_level: str = "INFO"


@dataclass
class Parallel:
    """The fields of vLLM's `ParallelConfig` that are read."""

    nnodes: int = 1
    distributed_executor_backend: str | None = "mp"
    data_parallel_size: int = 1
    data_parallel_size_local: int = 1


@dataclass
class Config:
    """The fields of vLLM's `VllmConfig` that are read."""

    logging_config: Logging
    parallel_config: Parallel = field(default_factory=Parallel)


SETTINGS: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"silent": {"class": "logging.NullHandler"}},
    "loggers": {"vllm": {"handlers": ["silent"], "propagate": False}},
}


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Config]:
    logger = logging.getLogger("vllm")
    handlers, propagate = [*logger.handlers], logger.propagate
    file = tmp_path / "logging.json"
    file.write_text(json.dumps(SETTINGS))
    yield Config(Logging(str(file)))
    logger.handlers, logger.propagate = handlers, propagate


def run_process(config: Config, *errors: Exception) -> None:
    """Do as a process of vLLM: set up logging, log errors, and end."""
    settings = json.loads(Path(str(config.logging_config.pylogging_config_file)).read_text())
    logging.config.dictConfig(settings)
    for error in errors:
        try:
            raise error
        except Exception:
            logging.getLogger("vllm.core").exception("it failed")


def message_of(config: Config, last: Exception, *errors: Exception) -> str:
    """Return the message of a start whose processes log errors, and which ends with the last."""

    def start() -> None:
        with explained(config, "[engine]"):
            run_process(config, *errors)
            raise last

    with pytest.raises(ConfigError) as caught:
        start()
    return caught.value.message


WRAPPER = RuntimeError(
    "Engine core initialization failed. See root cause above. Failed core proc(s): {'Core': 1}"
)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("max_model_len is 9\n\n more"), "ValueError: max_model_len is 9 more"),
        (FileNotFoundError(2, "No such file", "x.bin"), "FileNotFoundError: [Errno 2] No such"),
        (RuntimeError("Cannot find any model weights"), "RuntimeError: Cannot find any model"),
        (MemoryError(), "MemoryError"),
        (ValueError("x" * 9000), "ValueError: xxx"),
    ],
)
def test_the_first_error_of_a_process_is_the_reason(
    config: Config, error: Exception, line: str
) -> None:
    message = message_of(config, WRAPPER, error, RuntimeError("a worker has failed"))
    assert message.startswith(f"[engine] vLLM could not start: {line}")
    assert "a worker has failed" not in message
    assert "\n" not in message
    assert len(message) < 1000


def test_an_error_that_no_process_logged_is_its_own_reason(config: Config) -> None:
    assert "RuntimeError: no engine" in message_of(config, RuntimeError("no\nengine"))


def test_a_process_that_was_killed_lacked_memory(config: Config) -> None:
    killed = RuntimeError("Failed core proc(s): {'EngineCore_DP0': -9}")
    message = message_of(config, killed)
    assert "killed" in message
    assert "kv_cache_memory_bytes" in message


def test_an_error_of_the_configuration_stays_as_it_is(config: Config) -> None:
    assert message_of(config, ConfigError("[engine] x: wrong.")) == "[engine] x: wrong."


def test_the_configuration_is_the_same_afterwards(config: Config) -> None:
    before = config.logging_config
    with explained(config, "[engine]"):
        file = Path(str(config.logging_config.pylogging_config_file))
        handlers = json.loads(file.read_text())["loggers"]["vllm"]["handlers"]
        assert handlers[0] == "silent", "what a person configured stays"
        assert len(handlers) == 2
        run_process(config)
    assert config.logging_config is before
    assert not file.exists()
    # A process that goes on after the start has no file to write to.
    logging.getLogger("vllm").exception("late", exc_info=ValueError("late"))


@pytest.mark.parametrize(
    ("logging_config", "parallel"),
    [
        (Logging(configure_logging=False), Parallel()),
        (Logging(formatter="json"), Parallel()),
        (Logging("settings.json"), Parallel(nnodes=2)),
        (Logging("settings.json"), Parallel(distributed_executor_backend="ray")),
        (Logging("settings.json"), Parallel(data_parallel_size=4, data_parallel_size_local=2)),
    ],
)
def test_processes_elsewhere_keep_their_logging(
    logging_config: Logging, parallel: Parallel
) -> None:
    config = Config(logging_config, parallel)
    with explained(config, "[engine]"):
        assert config.logging_config is logging_config
