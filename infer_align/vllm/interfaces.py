"""The parts of vLLM that other packages use, in types that need no import of vLLM.

Importing vLLM takes ten seconds or more, and the type checker does not read it. The protocols
state which attributes of vLLM's objects this project relies on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from infer_align.errors import AlignError, EngineFailed, InvalidRequest, Unavailable


class Completion(NamedTuple):
    """A finished choice of vLLM, with what stands beside it.

    Attributes:
        choice: the finished choice, without its index.
        usage: vLLM's token counts.
        fields: what stands beside the two, such as system_fingerprint.
    """

    choice: dict[str, Any]
    usage: Mapping[str, Any]
    fields: dict[str, Any]


class ModelConfig(Protocol):
    """`vllm.config.ModelConfig`."""

    model: str
    max_model_len: int
    logprobs_mode: str
    is_diffusion: bool
    enable_prompt_embeds: bool
    hf_config: Any  # the configuration of transformers
    quantization: str | None
    revision: str | None

    def get_vocab_size(self) -> int:
        """Return the number of columns of the logits."""

    def get_hidden_size(self) -> int:
        """Return the size of a hidden state."""


class LoadConfig(Protocol):
    """`vllm.config.LoadConfig`."""

    load_format: str


class ParallelConfig(Protocol):
    """`vllm.config.ParallelConfig`."""

    enable_batch_sharded_sampling: bool
    distributed_executor_backend: str | None
    pipeline_parallel_size: int
    nnodes: int
    data_parallel_size: int
    data_parallel_size_local: int


class SchedulerConfig(Protocol):
    """`vllm.config.SchedulerConfig`."""

    max_num_seqs: int


class DeviceConfig(Protocol):
    """`vllm.config.DeviceConfig`."""

    device_type: str


class SpeculativeConfig(Protocol):
    """`vllm.config.SpeculativeConfig`."""

    num_speculative_tokens: int


class VllmConfig(Protocol):
    """`vllm.config.VllmConfig`, the configuration of one engine."""

    model_config: ModelConfig
    load_config: LoadConfig
    parallel_config: ParallelConfig
    scheduler_config: SchedulerConfig
    device_config: DeviceConfig
    speculative_config: SpeculativeConfig | None
    use_v2_model_runner: bool
    additional_config: dict[str, Any]
    logging_config: Any  # `vllm.config.logging.LoggingConfig`


class AsyncEngine(Protocol):
    """`vllm.v1.engine.async_llm.AsyncLLM`, an engine whose workers are other processes."""

    model_config: ModelConfig
    vllm_config: VllmConfig
    output_handler: asyncio.Task[None] | None

    @property
    def errored(self) -> bool:
        """Return True if the engine has died."""

    async def collective_rpc(self, method: str, *, args: tuple[object, ...] = ()) -> list[Any]:
        """Call a method in each worker of the first data-parallel rank."""

    async def abort(self, request_id: str) -> None:
        """Abort a request; its output ends with the tokens that it has."""

    def get_num_unfinished_requests(self) -> int:
        """Return the number of requests that still run."""

    def shutdown(self) -> None:
        """End the engine's processes; blocks for some seconds."""


@dataclass(slots=True)
class CandidateCall:
    """One candidate's request on its way through vLLM's OpenAI layer to the engine.

    Attributes:
        extra_args: added to SamplingParams.extra_args, where workers read them.
        prompt: the rendered prompt, if it was rendered once for all candidates of a draw.
        request_id: the engine's name of the request; set when the engine receives it.
    """

    extra_args: Mapping[str, Any] = field(default_factory=dict)
    prompt: Any = None
    request_id: str | None = None


def error_from_json(error: Mapping[str, Any]) -> AlignError:
    """Convert an error object of vLLM's OpenAI layer to an error of this project."""
    status = int(error["code"])
    message = str(error["message"])
    if status == 503:
        return Unavailable(message, retry_after=1)
    if 400 <= status < 500:
        return InvalidRequest(message, param=error.get("param"), status=status)
    return EngineFailed(message, status=status)
