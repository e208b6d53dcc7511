"""The values of one engine in the server process: their checks, and the options that vLLM needs.

The workers' part is processor.py. Nothing here imports vLLM before an engine starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from infer_align.engines.vllm.extra_args import (
    STEERING_KEY,
    SteeringRequest,
    publish_value_names,
    withdraw_value_names,
)
from infer_align.errors import ConfigError, InvalidRequest
from infer_align.types import Draw, Steering
from infer_align.values import FrozenModel, Value, check_values, tokenizer_digest
from infer_align.values.head import HeadValue
from infer_align.vllm.interfaces import ModelConfig, VllmConfig

# vLLM finds the processor by its full class name. An entry point would load it into every vLLM of
# the environment.
PROCESSOR = "infer_align.engines.vllm.processor:ValueProcessor"
WORKER_EXTENSION = "infer_align.engines.vllm.processor.WorkerExtension"

# AsyncLLM.collective_rpc: calls a method by name, with `args`, in every worker of an engine.
CallWorkers = Callable[..., Awaitable[list[Any]]]


class EngineValues:
    """The values by which requests of one engine can be steered."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        """Take the configured values.

        Raises:
            ConfigError: a value is of a kind that vLLM's workers cannot hold.
        """
        self._heads = {name: _head(name, value) for name, value in values.items()}
        self._frozen: FrozenModel | None = None
        self._adding = asyncio.Lock()

    @property
    def enabled(self) -> bool:
        """True if the engine has values. Without values it runs no code of this project."""
        return bool(self._heads)

    def value(self, name: str) -> Value:
        """Return the value of that name.

        Raises:
            KeyError: there is no such value.
        """
        return self._heads[name]

    def engine_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configured options with those that steering adds.

        Raises:
            ConfigError: an option is set that steering needs for itself.
        """
        if not self.enabled:
            return dict(options)
        extension = options.get("worker_extension_cls")
        if extension:
            raise ConfigError(
                f"[engine] worker_extension_cls: {extension!r} cannot be used with [values.*], "
                "which set their own worker extension; remove one of the two."
            )
        processors = [*(options.get("logits_processors") or ()), PROCESSOR]
        return {
            **options,
            "logits_processors": processors,
            "worker_extension_cls": WORKER_EXTENSION,
        }

    def configure(self, config: VllmConfig) -> None:
        """Check an engine's configuration and add what its workers need to know.

        Raises:
            ConfigError: steering would be wrong or would be skipped under this configuration, or a
                value was made for another model.
        """
        if not self.enabled:
            return
        for reason in _conflicts(config):
            raise ConfigError(f"[values.*] cannot steer this engine: {reason}")
        model = config.model_config
        frozen = FrozenModel(
            model.model,
            model.get_vocab_size(),
            model.get_hidden_size(),
            _tokenizer_digest(model),
            "cpu",
        )
        self._frozen = frozen
        for head in self._heads.values():
            _check_fit(head, frozen)
        publish_value_names(self, self._heads)
        paths = {name: head.path for name, head in self._heads.items()}
        config.additional_config = {
            **config.additional_config,
            STEERING_KEY: {"tokenizer": frozen.tokenizer, "values": paths},
        }

    async def check_weights(self, call_workers: CallWorkers) -> None:
        """Refuse heads that were fitted on other weights than those that the workers have loaded.

        Raises:
            ConfigError: naming the head and both models.
        """
        if self._frozen is None:
            return
        parts: dict[str, list[float]] = {}
        for fingerprint in await call_workers("infer_align_fingerprint"):
            parts.update(fingerprint)
        self._frozen = replace(self._frozen, fingerprint=parts)
        for head in self._heads.values():
            await asyncio.to_thread(_check_fit, head, self._frozen)

    async def add(self, name: str, value: Value, call_workers: CallWorkers) -> None:
        """Add a value, or replace the one of the same name, without a restart.

        Requests that are in the running batch keep the values that they joined with.

        Raises:
            ConfigError: the value does not fit the model, or the engine was started without values.
        """
        head = _head(name, value)
        frozen = self._frozen
        if frozen is None:
            raise ConfigError(
                f"[values.{name}] the engine was started without values, so it cannot steer; "
                "configure a value and restart the server."
            )
        async with self._adding:
            await asyncio.to_thread(_check_fit, head, frozen)
            # Either every worker can load the value, or none uses it.
            await call_workers("infer_align_load_value", args=(head.path,))
            users = sum(await call_workers("infer_align_use_value", args=(name,)))
            if not users:
                raise ConfigError(f"[values.{name}] no worker of this engine can use the value.")
            self._heads = {**self._heads, name: head}
            publish_value_names(self, self._heads)

    def close(self) -> None:
        """Stop accepting requests that are steered by these values."""
        withdraw_value_names(self)

    def check(self, draw: Draw) -> None:
        """Refuse a draw that cannot be steered or estimated.

        Raises:
            InvalidRequest: names the field.
        """
        check_values(draw, self._heads)
        if draw.steering and draw.body.get("use_beam_search"):
            raise InvalidRequest(
                "use_beam_search: true is not allowed with align.vas, which steers sampled tokens "
                "only; remove one of the two.",
                param="use_beam_search",
            )

    def extra_args(self, steering: Steering) -> dict[str, Any]:
        """Return the SamplingParams.extra_args of a request that is steered."""
        vocabulary_size = self._frozen.vocabulary if self._frozen else None
        return SteeringRequest.write(steering, vocabulary_size)


def _check_fit(head: HeadValue, frozen: FrozenModel) -> None:
    """Load a head in this process first, because a worker that cannot load it would die."""
    trial = HeadValue(head.path, head.description)
    trial.start(frozen, {})
    head.description = trial.description
    head.warnings = trial.warnings


def _head(name: str, value: Value) -> HeadValue:
    if isinstance(value, HeadValue):
        return value
    kind = type(value).__module__.rpartition(".")[2]
    raise ConfigError(
        f"[values.{name}] kind {kind!r} cannot run inside vLLM, whose workers hold one model and "
        'one cache; use kind = "head", or the transformers engine.'
    )


def _conflicts(config: VllmConfig) -> Iterator[str]:
    """Yield the settings under which steering would be wrong or silently skipped."""
    parallel = config.parallel_config
    if parallel.enable_batch_sharded_sampling:
        yield (
            "with enable_batch_sharded_sampling a worker samples rows whose hidden states it does "
            "not have; set it to false."
        )
    external = parallel.distributed_executor_backend == "external_launcher"
    if external and parallel.pipeline_parallel_size > 1:
        yield (
            "distributed_executor_backend = 'external_launcher' with pipeline_parallel_size > 1 "
            "samples in workers that have no hidden states; use another backend."
        )
    if config.model_config.is_diffusion:
        yield "a diffusion model samples without logits processors; use another model."
    if config.speculative_config is not None:
        yield from _speculative_conflicts(config, config.speculative_config.num_speculative_tokens)


def _speculative_conflicts(config: VllmConfig, draft_tokens: int) -> Iterator[str]:
    from infer_align.vllm.compat import (  # noqa: PLC0415 - importing vLLM waits for the start
        max_verification_rows,
    )

    if not config.use_v2_model_runner:
        yield (
            "vLLM's V1 model runner has no custom logits processors with speculative decoding; "
            "remove speculative_config."
        )
    sequences = config.scheduler_config.max_num_seqs
    rows = sequences * (draft_tokens + 1)
    limit = max_verification_rows(config.model_config.get_vocab_size())
    if rows > limit:
        yield (
            f"speculative_config: {sequences} sequences of {draft_tokens} + 1 tokens are {rows} "
            f"rows of logits, over the {limit} that vLLM verifies at once for this vocabulary; set "
            f"max_num_seqs to {max(1, limit // (draft_tokens + 1))} or less."
        )


def _tokenizer_digest(model_config: ModelConfig) -> str:
    from infer_align.vllm.compat import (  # noqa: PLC0415 - importing vLLM waits for the start
        vocabulary_of,
    )

    return tokenizer_digest(vocabulary_of(model_config))
