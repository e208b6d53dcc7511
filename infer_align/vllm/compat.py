"""Engines of vLLM: how to start, call and end them, and their errors.

The versions in `package.SUPPORTED` are accepted. What differs between them is in versions.py.
"""

# ruff: noqa: E402 - the version is checked before anything of vLLM is imported
from __future__ import annotations

import argparse
import asyncio
import json
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import transformers
from prometheus_client import generate_latest

from infer_align.checkpoints.complete import check_complete
from infer_align.errors import AlignError, ConfigError, EngineFailed, Unavailable
from infer_align.vllm import package as vllm_package
from infer_align.vllm.interfaces import AsyncEngine, ModelConfig, VllmConfig, error_from_json
from infer_align.vllm.log import join_log
from infer_align.vllm.start_errors import explained

vllm_package.require()

from vllm.config.model import try_match_architecture_defaults
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.logger import configure_logging_if_needed
from vllm.platforms import current_platform
from vllm.pooling_params import PoolingParams
from vllm.reasoning import ReasoningParserManager
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.tool_parsers import ToolParserManager
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.prometheus import get_prometheus_registry

from infer_align.vllm.versions import cli_env_setup, make_arg_parser

# The usage statistics of vLLM name the entry point; this server takes the place of vLLM's own.
ENTRY_POINT = UsageContext.OPENAI_API_SERVER


# --- a generating engine ---


def parse_options(model: str, served_name: str, options: Mapping[str, Any]) -> Namespace:
    """Return the arguments that `vllm serve` would have for these options.

    Raises:
        ConfigError: vLLM does not accept the value of an option.
    """
    if options.get("api_key") or os.environ.get("VLLM_API_KEY"):
        raise ConfigError(
            "api_key and VLLM_API_KEY would protect only vLLM's own routes of this server; remove "
            "them, and name the variable that holds the keys in [server] api_keys_env."
        )
    parser = make_arg_parser(_OptionParser())
    actions = {action.dest: action for action in parser._actions}
    command_line: list[str] = []
    for name, value in options.items():
        if name in actions:
            command_line += _command_line(actions[name], value)
    args: Namespace = parser.parse_args(command_line)
    # Some fields of the engine's arguments have no flag on the command line.
    for name in options.keys() - actions.keys():
        setattr(args, name, options[name])
    args.model = model
    args.served_model_name = [served_name]
    return args


class _OptionParser(FlexibleArgumentParser):  # type: ignore[misc]
    """Raises an error instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"[engine] {message}")


def _command_line(action: argparse.Action, value: object) -> list[str]:
    """Write an option as on the command line, so that vLLM parses it with all its own rules."""
    flag = next(option for option in action.option_strings if option.startswith("--"))
    if action.nargs == 0:
        return _switch(action, flag, value)
    if action.nargs in {"+", "*"}:
        values = value if isinstance(value, list | tuple) else [value]
        return [flag, *map(_argument, values)]
    return [f"{flag}={_argument(value)}"]


def _switch(action: argparse.Action, flag: str, value: object) -> list[str]:
    if not isinstance(value, bool):
        raise ConfigError(
            f"[engine] {action.dest}: {value!r} is not allowed; must be true or false."
        )
    if value:
        return [flag]
    negated = f"--no-{flag.removeprefix('--')}"
    return [negated] if negated in action.option_strings else []


def _argument(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def launch(args: Namespace, configure: Callable[[VllmConfig], None]) -> AsyncEngine:
    """Start an engine and load its model. Blocks for seconds to minutes; any thread may call it.

    Args:
        args: the result of `parse_options`.
        configure: called with the engine's configuration before the engine is built.

    Raises:
        ConfigError: vLLM refuses the options or their combination, or one of its processes fails.
    """
    # vLLM would otherwise report usage statistics over the network.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    cli_env_setup()
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    if current_platform.is_cpu() and engine_args.enable_chunked_prefill is None:
        # On a CPU, a seeded request whose prompt is read in several chunks ends the engine.
        engine_args.enable_chunked_prefill = False
    config = _create_config(engine_args, "[engine]")
    configure(config)
    engine: AsyncEngine
    with explained(config, "[engine]"):
        engine = AsyncLLM.from_vllm_config(
            config,
            usage_context=ENTRY_POINT,
            enable_log_requests=engine_args.enable_log_requests,
            aggregate_engine_logging=engine_args.aggregate_engine_logging,
            disable_log_stats=engine_args.disable_log_stats,
        )
    join_log(config.logging_config)
    return engine


def _create_config(options: AsyncEngineArgs | Mapping[str, Any], section: str) -> VllmConfig:
    with _option_errors(section):
        args = AsyncEngineArgs(**options) if isinstance(options, Mapping) else options
        # vLLM configures its logging once for equal settings, so do it before the first record.
        settings = args.create_logging_config()
        configure_logging_if_needed(settings)
        join_log(settings)
        config: VllmConfig = args.create_engine_config(ENTRY_POINT)
    return config


@contextmanager
def _option_errors(section: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        raise ConfigError(f"{section} vLLM refuses these options: {error}") from error


def generated_tokens(engine: AsyncLLM, request_id: str | None) -> int:
    """Return the number of tokens of a request that have arrived in this process.

    The number is 0 for a request that is not running.
    """
    if not request_id:
        return 0
    output = engine.output_processor
    for internal_id in output.external_req_ids.get(request_id, ()):
        state = output.request_states.get(internal_id)
        if state is not None and state.detokenizer is not None:
            return int(state.detokenizer.num_output_tokens())
    return 0


async def call_workers(engine: AsyncLLM, method: str) -> list[Any]:
    """Call a method in every worker of every data-parallel rank; return one result per worker.

    AsyncLLM's own `collective_rpc` returns the results of the first rank only.
    """
    core = engine.engine_core
    ranks = await core.call_utility_all_async("collective_rpc", method, None, (), None)
    return [result for workers in ranks for result in workers]


async def shut_down(engine: AsyncEngine, *, abandon_requests: bool = False) -> None:
    """End an engine's processes.

    Args:
        engine: the engine.
        abandon_requests: True if nothing waits for requests that still run. Otherwise they fail.
    """
    # The handler would report the end of the processes as their death, and fail the requests.
    handler = engine.output_handler
    if handler is not None and (abandon_requests or not engine.get_num_unfinished_requests()):
        handler.cancel()
    await asyncio.to_thread(engine.shutdown)


# --- what both kinds of engine need ---


def convert_error(error: Exception) -> AlignError:
    """Convert an exception of vLLM to the error that vLLM's own server would answer."""
    if isinstance(error, EngineDeadError):
        return Unavailable("vLLM's engine has stopped; see its log for the cause.")
    return error_from_json(create_error_response(error).error.model_dump())


def vocabulary_of(model_config: ModelConfig) -> dict[str, int]:
    """Return the token ids of a model's tokenizer by token.

    Raises:
        ConfigError: the configuration leaves the tokenizer out.
    """
    tokenizer = cached_tokenizer_from_config(model_config)
    if tokenizer is None:
        raise ConfigError(
            "engine.skip_tokenizer_init: true is not allowed; values and judges need the model's "
            "tokenizer. Remove the option."
        )
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return vocabulary


def max_verification_rows(vocabulary_size: int) -> int:
    """Return the number of rows of logits that speculative decoding verifies in one chunk."""
    # The module needs Triton, so only engines that speculate import it.
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import (  # noqa: PLC0415
        get_max_chunk_logits,
    )

    rows: int = get_max_chunk_logits(vocabulary_size)
    return rows


def metrics_text() -> bytes:
    """Return the metrics that vLLM collects in this process, in Prometheus's text format."""
    return generate_latest(get_prometheus_registry())


# --- a pooling engine: a reward model ---


def launch_pooling(model: str, options: Mapping[str, Any]) -> AsyncEngine:
    """Start an engine that classifies sequences. Blocks for seconds to minutes.

    Raises:
        ConfigError: vLLM refuses the options, one of its processes fails, the model lacks weights,
            or it generates text. vLLM would add a classification head with random weights to such
            a model.
    """
    fixed = {
        "model": model,
        "runner": "pooling",
        "convert": "classify",
        # vLLM has one metrics registry per process. It belongs to the generating engine.
        "disable_log_stats": True,
    }
    config = _create_config({**options, **fixed}, "pooling:")
    _check_classifier(model, config.model_config.hf_config)
    _check_weights(model, config)
    engine: AsyncEngine
    with explained(config, f"pooling: {model!r}:"):
        engine = AsyncLLM.from_vllm_config(
            config, usage_context=ENTRY_POINT, disable_log_stats=True
        )
    join_log(config.logging_config)
    return engine


def _check_classifier(model: str, hf_config: Any) -> None:
    architectures = hf_config.architectures or ()
    # Such a model has no classification head, but takes the rows of some tokens as one.
    for config in (hf_config, hf_config.get_text_config()):
        if getattr(config, "classifier_from_token", None):
            return
    for architecture in architectures:
        match = try_match_architecture_defaults(architecture)
        if not match or match[1][0] != "generate":
            return
    names = ", ".join(architectures or ("of no named architecture",))
    raise ConfigError(
        f"pooling: {model!r} is no sequence classifier: it is {names}; choose a model with a "
        "classification head."
    )


def _check_weights(model: str, config: VllmConfig) -> None:
    """Refuse a classifier that lacks weights. vLLM itself looks for those of norms alone.

    transformers compares the checkpoint with the architecture, and reads no weights. What it cannot
    compare is left to vLLM: other architectures, quantised weights, and models that have no head.
    """
    hf_config = config.model_config.hf_config
    architecture = (hf_config.architectures or [""])[0]
    cls = getattr(transformers, architecture, None)
    is_derived = getattr(hf_config.get_text_config(), "classifier_from_token", None) is not None
    is_read = config.load_config.load_format in {"auto", "safetensors", "hf", "pt"}
    if cls is None or is_derived or not is_read or config.model_config.quantization is not None:
        return
    _, loading = cls.from_pretrained(
        model,
        config=hf_config,
        revision=config.model_config.revision,
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_complete("pooling", model, "sequence classifier", loading)


def classifier_config(engine: AsyncLLM) -> Any:
    """Return the transformers configuration of a pooling engine's model, which has its labels."""
    return engine.model_config.hf_config


def readable_tokens(engine: AsyncLLM) -> int:
    """Return the maximum number of tokens that a pooling engine's model can read.

    vLLM counts all rows of a position table. The models of RoBERTa's family use only those after
    the row of the padding token.
    """
    length = int(engine.model_config.max_model_len)
    config = engine.model_config.hf_config
    if "roberta" not in config.model_type:
        return length
    return min(length, int(config.max_position_embeddings) - int(config.pad_token_id) - 1)


async def classifies_sequences(engine: AsyncLLM) -> bool:
    """Return True if a pooling engine predicts per sequence. Some reward models do per token."""
    return "classify" in await engine.get_supported_tasks()


async def class_logits(engine: AsyncLLM, token_ids: Sequence[int], request_id: str) -> list[float]:
    """Return the raw logits of a sequence, one per label. Cancelling it aborts the request.

    Raises:
        AlignError: vLLM refuses the sequence, or failed.
    """
    # The activation would turn the logits into probabilities.
    params = PoolingParams(task="classify", use_activation=False)
    prompt = {"type": "token", "prompt_token_ids": [*token_ids]}
    logits: list[float] = []
    try:
        async for output in engine.encode(prompt, params, request_id):
            if output.error is not None:
                raise EngineFailed(output.error.message)
            logits = output.outputs.data.tolist()
    except AlignError:
        raise
    except Exception as error:
        raise convert_error(error) from error
    return logits
