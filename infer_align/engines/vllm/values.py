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
from infer_align.engines.vllm.value_source import load_source, write_source
from infer_align.errors import ConfigError, InvalidRequest
from infer_align.steering import Steering
from infer_align.types import Draw
from infer_align.values import FrozenModel, Value, check_values, tokenizer_digest
from infer_align.values.head import HeadValue
from infer_align.values.lookahead import LookaheadValue, ValueLM
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
        self._sources = {name: write_source(name, value) for name, value in values.items()}
        self._values = dict(values)
        self._frozen: FrozenModel | None = None
        self._config: VllmConfig | None = None
        self._adding = asyncio.Lock()

    @property
    def enabled(self) -> bool:
        """Return True if the engine has values. Without values it runs no code of this project."""
        return bool(self._values)

    def value(self, name: str) -> Value:
        """Return the value of that name.

        Raises:
            KeyError: there is no such value.
        """
        return self._values[name]

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
        self._config = config
        shared: dict[object, Any] = {}
        for name, value in self._values.items():
            _check_fit(name, value, frozen, config, shared)
        publish_value_names(self, self._values)
        config.additional_config = {
            **config.additional_config,
            STEERING_KEY: {"tokenizer": frozen.tokenizer, "values": self._sources},
        }

    async def check_weights(self, call_workers: CallWorkers) -> None:
        """Refuse heads that were fitted on other weights than those that the workers have loaded.

        Raises:
            ConfigError: naming the head and both models.
        """
        frozen, config = self._frozen, self._config
        if frozen is None or config is None:
            return
        parts: dict[str, list[float]] = {}
        for fingerprint in await call_workers("infer_align_fingerprint"):
            parts.update(fingerprint)
        self._frozen = replace(frozen, fingerprint=parts)
        for name, value in self._values.items():
            # A value LM reads tokens alone, so no weights of the model matter to it.
            if isinstance(value, HeadValue):
                await asyncio.to_thread(_check_fit, name, value, self._frozen, config, {})

    async def add(self, name: str, value: Value, call_workers: CallWorkers) -> None:
        """Add a value, or replace the one of the same name, without a restart.

        Requests that are in the running batch keep the values that they joined with.

        Raises:
            ConfigError: the value does not fit the model, or the engine was started without values.
        """
        source = write_source(name, value)
        frozen, config = self._frozen, self._config
        if frozen is None or config is None:
            raise ConfigError(
                f"[values.{name}] the engine was started without values, so it cannot steer; "
                "configure a value and restart the server."
            )
        async with self._adding:
            await asyncio.to_thread(_check_fit, name, value, frozen, config, {})
            # Either every worker can load the value, or none uses it.
            await call_workers("infer_align_load_value", args=(source,))
            users = sum(await call_workers("infer_align_use_value", args=(name,)))
            if not users:
                raise ConfigError(f"[values.{name}] no worker of this engine can use the value.")
            self._values = {**self._values, name: value}
            publish_value_names(self, self._values)

    def close(self) -> None:
        """Stop accepting requests that are steered by these values."""
        withdraw_value_names(self)

    def check(self, draw: Draw) -> None:
        """Refuse a draw that cannot be steered or estimated.

        Raises:
            InvalidRequest: names the field.
        """
        check_values(draw, self._values)
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


def _check_fit(
    name: str,
    value: Value,
    frozen: FrozenModel,
    config: VllmConfig,
    shared: dict[object, Any],
) -> None:
    """Load a value in this process first, because a worker that cannot load it would die.

    Args:
        name: of the value.
        value: its description, warnings and summary are completed.
        frozen: the model to be steered.
        config: of the engine.
        shared: see `Value.start`.

    Raises:
        ConfigError: the value does not fit the model, or cannot steer this engine.
    """
    trial = load_source(write_source(name, value))
    trial.start(frozen, shared)
    value.description = trial.description
    value.warnings = trial.warnings
    value.summary = trial.summary
    if isinstance(trial, LookaheadValue) and trial.lm:
        for reason in _lookahead_conflicts(config, trial.lm):
            raise ConfigError(f"[values.{name}] a lookahead value cannot steer here: {reason}")
        value.warnings += tuple(_memory_warnings(config, trial.lm))


def _lookahead_conflicts(config: VllmConfig, lm: ValueLM) -> Iterator[str]:
    """Yield the settings under which a value LM would read wrong tokens, or none."""
    if config.speculative_config is not None:
        yield (
            "speculative_config samples several tokens per step, and the value LM would have to "
            "read drafts that are dropped; remove it, or use a value of kind head."
        )
    model = config.model_config
    if model.enable_prompt_embeds:
        yield (
            "enable_prompt_embeds allows prompts without token ids, which the value LM cannot "
            "read; set it to false, or use a value of kind head."
        )
    limit = getattr(lm.lm.config, "max_position_embeddings", None)
    if limit is not None and limit < model.max_model_len:
        yield (
            f"its value LM reads up to {limit} tokens, but max_model_len is "
            f"{model.max_model_len}; set max_model_len to {limit} or less."
        )


def _memory_warnings(config: VllmConfig, lm: ValueLM) -> Iterator[str]:
    """Yield what an operator of a GPU has to leave free: vLLM does not count it."""
    if config.device_config.device_type == "cpu":
        return
    requests = config.scheduler_config.max_num_seqs
    length = config.model_config.max_model_len
    gibibytes = requests * length * lm.cell_bytes / 2**30
    yield (
        f"its value LM keeps up to {gibibytes:.1f} GiB of keys and values, for {requests} requests "
        f"of {length} tokens, outside of gpu_memory_utilization; leave them free, or lower "
        "max_num_seqs or max_model_len."
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
