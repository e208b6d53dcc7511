"""The log of vLLM in this process: its records go where those of all other packages go.

Whenever an engine is configured, vLLM gives its logger a handler that writes lines of text. The
processes that vLLM starts keep that handler.
"""

from __future__ import annotations

import logging
from typing import Any

LOGGER = "vllm"


def join_log(settings: Any) -> None:
    """Pass the records of vLLM's logger on to the handlers of this program, if it has any.

    Call it each time when vLLM has configured its logger. Nothing changes if the operator has
    configured vLLM's logging.

    Args:
        settings: `vllm.config.logging.LoggingConfig` of the engine.
    """
    is_default = settings.configure_logging and not settings.pylogging_config_file
    if is_default and logging.getLogger().handlers:
        logger = logging.getLogger(LOGGER)
        logger.handlers = []
        logger.propagate = True
