"""Everything that is taken from vLLM: its names, and where versions differ. Beside vllm_openai.py nothing else imports vLLM.

Let in is what `vllm_package.SUPPORTED` says, as nothing else is tested. What would have to change here and in vllm_openai.py for
0.24: it has no logits processors of the V2 runner (with ours it takes V1), builds its application in
`entrypoints.openai.api_server`, and has `ErrorResponse` in `entrypoints.openai.engine.protocol`.
"""

# mypy: disable-error-code="import-not-found,import-untyped"
# ruff: noqa: PLC0415, E402 - what only a worker or a server needs is loaded there
from __future__ import annotations

import asyncio
import json
import os
import weakref
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from infer_align.errors import AlignError, ConfigError, EngineFailed, InvalidRequest, Unavailable
from infer_align.vllm import package as vllm_package

vllm_package.require()  # before anything of it is imported: another version fails here with its number, not with a name

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, process_dict_updates
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

__all__ = [
    "BatchUpdate",
    "LogitsContext",
    "LogitsProcessorV1",
    "LogitsProcessorV2",
    "Tap",
    "process_dict_updates",
    "verification_rows",
    "vocabulary_of",
]


class Tap:
    """What the output layer of the model in this worker reads: the hidden states, one row per row of logits.

    The layer class is patched, not the model: every architecture calls it, eagerly, with the rows that are about to be sampled.
    Log-probabilities of prompts and drafters call it after the sampler has run, so the latest call before the sampler is the one.
    Of the engines in one process, one steps at a time.
    """

    def __init__(self) -> None:
        self.armed = False  # whether anybody will want the next states
        self._latest: torch.Tensor | None = None
        _install()
        _taps.add(self)

    def put(self, hidden: torch.Tensor) -> None:
        """For the output layer."""
        self._latest = hidden if self.armed else None

    def take(self, rows: int) -> torch.Tensor:
        """The states behind `rows` logits, [rows, d], once.

        Raises:
            RuntimeError: there are none, or of other rows: steering would read the wrong states, so the engine has to stop.
        """
        hidden, self._latest = self._latest, None
        if hidden is None or len(hidden) != rows:
            found = "none were seen" if hidden is None else f"{len(hidden)} were seen"
            raise RuntimeError(
                f"steering needs the hidden states of {rows} rows of logits, but {found}; this model cannot be steered."
            )
        return hidden


_taps: weakref.WeakSet[Tap] = weakref.WeakSet()


def _install() -> None:
    from vllm.model_executor.layers.logits_processor import LogitsProcessor as OutputLayer

    original = OutputLayer.forward
    if getattr(original, "is_tapped", False):
        return

    def forward(
        layer: Any, lm_head: Any, hidden_states: torch.Tensor, *args: Any, **options: Any
    ) -> Any:
        for tap in _taps:
            tap.put(hidden_states)
        return original(layer, lm_head, hidden_states, *args, **options)

    forward.is_tapped = True  # type: ignore[attr-defined]
    OutputLayer.forward = forward


def verification_rows(vocabulary: int) -> int:
    """Rows of logits that a step of speculative decoding verifies at once; more are cut into several."""
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

    rows: int = get_max_chunk_logits(vocabulary)
    return rows


def vocabulary_of(model_config: Any) -> dict[str, int]:
    """The tokenizer's tokens and their ids, of a ModelConfig."""
    from vllm.tokenizers import cached_tokenizer_from_config

    vocabulary: dict[str, int] = cached_tokenizer_from_config(model_config).get_vocab()
    return vocabulary


# --- one engine, and vLLM's own OpenAI layer over it ---


def arguments(model: str, name: str, options: Mapping[str, Any]) -> Namespace:
    """What `vllm serve` would make of these options: of the engine, and of its OpenAI layer.

    Raises:
        ConfigError: an option has a value that it cannot have.
    """
    if options.get("api_key") or os.environ.get("VLLM_API_KEY"):
        raise ConfigError(
            "api_key and VLLM_API_KEY would guard a part of this server only; leave them out, and name the variable that holds the "
            "keys with [server] api_keys_env."
        )
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"[engine] {message}")

    parser = make_arg_parser(Parser())
    actions = {action.dest: action for action in parser._actions}
    spoken = [
        word
        for key, value in options.items()
        if key in actions
        for word in _spoken(actions[key], value)
    ]
    args: Namespace = parser.parse_args(spoken)
    for key in options.keys() - actions.keys():  # not to be had from the command line
        setattr(args, key, options[key])
    args.model, args.served_model_name = model, [name]
    return args


def _spoken(action: Any, value: Any) -> list[str]:
    """An option as the command line has it: each is read there, with all its forms and rules."""
    flag = next(option for option in action.option_strings if option.startswith("--"))
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(
                f"[engine] {action.dest}: {value!r} is not allowed; must be true or false."
            )
        no = f"--no-{flag[2:]}"
        return [flag] if value else [no] if no in action.option_strings else []
    if action.nargs in {"+", "*"}:
        return [flag, *map(_word, value if isinstance(value, list | tuple) else [value])]
    return [f"{flag}={_word(value)}"]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def launch(args: Namespace, configure: Callable[[Any], None]) -> Any:
    """An AsyncLLM with its model loaded: takes seconds to minutes, in any thread. `configure` sees the VllmConfig before.

    Raises:
        ConfigError: the options do not go together.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.platforms import current_platform
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    os.environ.setdefault(
        "VLLM_NO_USAGE_STATS", "1"
    )  # a server says nothing to others unless it is told to
    cli_env_setup()
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    given = AsyncEngineArgs.from_cli_args(args)
    if current_platform.is_cpu() and given.enable_chunked_prefill is None:
        given.enable_chunked_prefill = (
            False  # there, a seeded request whose prompt is read in pieces ends the engine
        )
    try:
        config = given.create_engine_config(UsageContext.OPENAI_API_SERVER)
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        raise ConfigError(f"[engine] vLLM refuses these options: {error}") from error
    configure(config)
    return AsyncLLM.from_vllm_config(
        config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=given.enable_log_requests,
        aggregate_engine_logging=given.aggregate_engine_logging,
        disable_log_stats=given.disable_log_stats,
    )


def refusal(error: Exception) -> AlignError:
    """An exception of vLLM's as it would answer it."""
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, EngineDeadError):
        return Unavailable("vLLM's engine has died; its log says why.")
    return refused(create_error_response(error).error.model_dump())


def refused(error: Mapping[str, Any]) -> AlignError:
    """vLLM's error object as one of ours: the client's fault, not now, or a failure."""
    status, message = int(error["code"]), str(error["message"])
    if status == 503:
        return Unavailable(message, retry_after=1)
    if 400 <= status < 500:
        return InvalidRequest(message, param=error.get("param"), status=status)
    return EngineFailed(message, status=status)


async def label_logprobs(
    engine: Any, prompt: Sequence[int], tokens: Sequence[int], request_id: str
) -> dict[int, float]:
    """The next token's logprobs for `tokens` after a prompt of token ids, before any processor; one generated token.

    Raises:
        AlignError: vLLM refuses the prompt, or failed.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    params = SamplingParams(
        max_tokens=1,
        temperature=1.0,
        logprob_token_ids=[*tokens],
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    found: dict[int, float] = {}
    try:
        async for output in engine.generate({"prompt_token_ids": [*prompt]}, params, request_id):
            found = {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}
    except Exception as error:
        raise refusal(error) from error
    return {token: found[token] for token in tokens}


def sampled_tokens(engine: Any, request_id: str | None) -> int:
    """How many tokens a request of an AsyncLLM has by now, as far as this process has heard; 0 where it is not known."""
    output = engine.output_processor
    for internal in output.external_req_ids.get(request_id, ()) if request_id else ():
        if (
            state := output.request_states.get(internal)
        ) is not None and state.detokenizer is not None:
            return int(state.detokenizer.num_output_tokens())
    return 0


async def call_workers(engine: Any, method: str) -> list[Any]:
    """What every worker of every data-parallel rank says; AsyncLLM's own `collective_rpc` returns the first rank's answers only."""
    ranks = await engine.engine_core.call_utility_all_async(
        "collective_rpc", method, None, (), None
    )
    return [said for workers in ranks for said in workers]


async def shut_down(engine: Any) -> None:
    """End an AsyncLLM's processes; requests that still run fail."""
    if engine.output_handler is not None and not engine.get_num_unfinished_requests():
        engine.output_handler.cancel()  # it would report the end of the processes as their death
    await asyncio.to_thread(engine.shutdown)


def exposition() -> bytes:
    """What vLLM counts in this process, in Prometheus's format."""
    from prometheus_client import generate_latest
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    return generate_latest(get_prometheus_registry())


# --- reward models ---


def launch_pooling(model: str, options: Mapping[str, Any]) -> Any:
    """An AsyncLLM that classifies sequences: takes seconds to minutes, in any thread.

    Raises:
        ConfigError: the options do not go together, or the model generates text: vLLM would make up a head for it, at random.
    """
    from vllm.config.model import try_match_architecture_defaults
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        # Its counters would take the place of the generating engine's: vLLM has one registry per process.
        ours = {
            "model": model,
            "runner": "pooling",
            "convert": "classify",
            "disable_log_stats": True,
        }
        config = AsyncEngineArgs(**{**options, **ours}).create_engine_config(
            UsageContext.OPENAI_API_SERVER
        )
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        raise ConfigError(f"pooling: vLLM refuses these options: {error}") from error
    shape = config.model_config.hf_config
    matches = [try_match_architecture_defaults(name) for name in shape.architectures or ()]
    made_of_tokens = getattr(shape, "classifier_from_token", None) or getattr(
        shape.get_text_config(), "classifier_from_token", None
    )
    if not made_of_tokens and all(match and match[1][0] == "generate" for match in matches):
        names = ", ".join(shape.architectures or ("of no named architecture",))
        raise ConfigError(f"pooling: {model!r} is no sequence classifier: it is {names}.")
    return AsyncLLM.from_vllm_config(
        config, usage_context=UsageContext.OPENAI_API_SERVER, disable_log_stats=True
    )


def labels_and_context(engine: Any) -> tuple[int, int]:
    """How many labels a pooling engine's model has, and how many tokens it reads."""
    return int(engine.model_config.hf_config.num_labels), int(engine.model_config.max_model_len)


async def classifies(engine: Any) -> bool:
    """Whether a pooling engine has one prediction per sequence; some reward models have one per token."""
    return "classify" in await engine.get_supported_tasks()


async def class_logits(engine: Any, ids: Sequence[int], request_id: str) -> list[float]:
    """The raw logits of a sequence of token ids, one per label; cancelled, the request is aborted.

    Raises:
        AlignError: vLLM refuses it, or failed.
    """
    from vllm.pooling_params import PoolingParams

    logits: list[float] = []
    try:
        # Without use_activation = False they would be probabilities.
        params = PoolingParams(task="classify", use_activation=False)
        async for output in engine.encode(
            {"type": "token", "prompt_token_ids": [*ids]}, params, request_id
        ):
            if output.error is not None:
                raise EngineFailed(output.error.message)
            logits = output.outputs.data.tolist()
    except AlignError:
        raise
    except Exception as error:
        raise refusal(error) from error
    return logits
