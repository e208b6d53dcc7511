"""The parts of vLLM that differ between its supported versions.

0.33 moved two functions of the command line to `entrypoints.common`. The other parts that this
project uses are the same in 0.32 and 0.33.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from infer_align.vllm import package as vllm_package


def _function(name: str, modules: dict[str, str]) -> Callable[..., Any]:
    """Return a function of the installed vLLM, whose module depends on the version."""
    module = import_module(modules[vllm_package.release(vllm_package.require())])
    function: Callable[..., Any] = getattr(module, name)
    return function


# Adds the options of `vllm serve` to a parser.
make_arg_parser = _function(
    "make_arg_parser",
    {
        "0.32": "vllm.entrypoints.launchers.cli_args",
        "0.33": "vllm.entrypoints.common.cli_args",
    },
)
# Prepares the environment as the command line of vLLM does.
cli_env_setup = _function(
    "cli_env_setup",
    {
        "0.32": "vllm.entrypoints.serve.utils.api_utils",
        "0.33": "vllm.entrypoints.common.startup",
    },
)
