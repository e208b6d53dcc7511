"""VAS inside vLLM, the frontend's side: which values there are, what a request may ask of them, and what it tells the workers.

The workers' side is processor.py. Nothing here needs vLLM until an engine starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, NamedTuple

from infer_align.errors import ConfigError, InvalidRequest, nearest
from infer_align.methods.vas import MAX_BETA
from infer_align.types import Draw, Steering
from infer_align.values import FrozenModel, Value, check_values, tokenizer_digest
from infer_align.values.head import HeadValue

# Where a request's steering stands in SamplingParams.extra_args, and the values in the engine's additional_config.
KEY = "infer_align"

# By full class name, not by entry point: that would load it into every vLLM of the environment.
PROCESSOR = "infer_align.engines.vllm.processor:ValueProcessor"
WORKER_EXTENSION = "infer_align.engines.vllm.processor.WorkerExtension"

# A method's name and its arguments, called in every worker of an engine: AsyncLLM.collective_rpc.
Call = Callable[..., Awaitable[list[Any]]]

# Names of the values that the engines of this process hold; for `Terms.read` where requests come in.
announced: set[str] = set()


class Terms(NamedTuple):
    """How one request wants to be steered, as it travels to the workers."""

    beta: Mapping[str, float]  # none of them 0
    top_k: int
    mask: bool  # whether the tail is masked

    @classmethod
    def read(cls, extra_args: Mapping[str, Any] | None) -> Terms | None:
        """What a request's extra arguments ask for; None where it does not steer, or every weight is 0.

        Raises:
            ValueError: of another form, or out of bounds.
        """
        given = (extra_args or {}).get(KEY)
        if given is None:
            return None
        if (
            not isinstance(given, Mapping)
            or given.keys() != {"beta", "top_k", "tail"}
            or not isinstance(given["beta"], Mapping)
        ):
            raise ValueError(
                f"extra_args.{KEY}: not of the form {{beta, top_k, tail}}; ask for align.vas instead."
            )
        top_k, tail = given["top_k"], given["tail"]
        weights = {
            name: checked_weight(f"align.vas.beta.{name}", name, weight)
            for name, weight in given["beta"].items()
        }
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
            raise ValueError(f"align.vas.top_k: {top_k!r} is not allowed; must be an integer >= 1.")
        if tail not in {"keep", "mask"}:
            raise ValueError(f'align.vas.tail: {tail!r} is not allowed; must be "keep" or "mask".')
        used = {name: weight for name, weight in weights.items() if weight}
        return cls(used, top_k, tail == "mask") if used else None


def checked_weight(where: str, name: object, weight: object) -> float:
    """The weight of a value, as a request names it.

    Raises:
        ValueError: no such value, or no such weight; a worker would die of it.
    """
    if not isinstance(name, str) or (announced and name not in announced):
        raise ValueError(f"{where}: no such value; {nearest(str(name), announced)}")
    if (
        not isinstance(weight, int | float)
        or isinstance(weight, bool)
        or not abs(weight) <= MAX_BETA
    ):  # NaN is not
        raise ValueError(
            f"{where}: {weight!r} is not allowed; must be from {-MAX_BETA:g} to {MAX_BETA:g}."
        )
    return float(weight)


class Steerer:
    """The values of one engine.

    Raises:
        ConfigError: a value is of a kind that cannot live inside vLLM.
    """

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._heads = {name: _head(name, value) for name, value in values.items()}
        self._frozen: FrozenModel | None = None
        self._adding = asyncio.Lock()

    @property
    def active(self) -> bool:
        """Whether the engine steers at all; an engine without values carries nothing of it."""
        return bool(self._heads)

    def value(self, name: str) -> Value:
        """The value of that name.

        Raises:
            KeyError: no such value.
        """
        return self._heads[name]

    def engine_args(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The configured AsyncEngineArgs with what steering adds to them.

        Raises:
            ConfigError: an option is set that steering needs for itself.
        """
        if not self.active:
            return dict(given)
        if other := given.get("worker_extension_cls"):
            raise ConfigError(
                f"[engine] worker_extension_cls: {other!r} cannot be used with [values.*], which take its place; leave one out."
            )
        processors = [*(given.get("logits_processors") or ()), PROCESSOR]
        return {**given, "logits_processors": processors, "worker_extension_cls": WORKER_EXTENSION}

    def configure(self, config: Any) -> None:
        """Check a VllmConfig, before its engine is built, and leave in it what the workers have to know.

        Raises:
            ConfigError: steering would be wrong or bypassed under this configuration, or a value was made for another model.
        """
        if not self.active:
            return
        for why in _refusals(config):
            raise ConfigError(f"[values.*] cannot steer this engine: {why}")
        model = config.model_config
        self._frozen = FrozenModel(
            model.model, model.get_vocab_size(), model.get_hidden_size(), _digest(model), "cpu"
        )
        for head in self._heads.values():
            self._admit(head)
        announced.update(self._heads)
        paths = {name: head.path for name, head in self._heads.items()}
        config.additional_config = {
            **config.additional_config,
            KEY: {"tokenizer": self._frozen.tokenizer, "values": paths},
        }

    async def add(self, name: str, value: Value, call: Call) -> None:
        """Let requests steer by another value from now on, without a restart; one of the same name is replaced.

        A request keeps the values that were there when it joined the running batch.

        Raises:
            ConfigError: it does not fit the model, or the engine was started without values.
        """
        head = _head(name, value)
        if self._frozen is None:
            raise ConfigError(
                f"[values.{name}] the engine was started without values; configure one and start it again."
            )
        async with self._adding:
            await asyncio.to_thread(self._admit, head)
            await call(
                "infer_align_load_value", args=(head.path,)
            )  # every worker can, or none changes
            if not sum(await call("infer_align_use_value", args=(name,))):
                raise ConfigError(f"[values.{name}] no worker of this engine can take it.")
            self._heads = {**self._heads, name: head}
            announced.add(name)

    def check(self, draw: Draw) -> None:
        """Refuse what cannot be steered or watched.

        Raises:
            InvalidRequest: naming the field.
        """
        check_values(draw, self._heads)
        if draw.steering and draw.body.get("use_beam_search"):
            raise InvalidRequest(
                "use_beam_search: true is not allowed with align.vas, which steers what is sampled; leave out one.",
                param="use_beam_search",
            )

    def extra_args(self, steering: Steering) -> dict[str, Any]:
        """What a request says in SamplingParams.extra_args."""
        top_k = min(steering.top_k, self._frozen.vocabulary) if self._frozen else steering.top_k
        return {KEY: {"beta": dict(steering.beta), "top_k": top_k, "tail": steering.tail}}

    def _admit(self, head: HeadValue) -> None:
        """Read a head once, here, so that a worker does not die of it."""
        assert self._frozen is not None
        trial = HeadValue(head.path, head.description)
        trial.start(self._frozen, {})
        head.description = trial.description


def _head(name: str, value: Value) -> HeadValue:
    if not isinstance(value, HeadValue):
        kind = type(value).__module__.rpartition(".")[2]
        raise ConfigError(
            f"[values.{name}] kind {kind!r} cannot live inside vLLM, whose workers run one model and one cache; "
            'use kind = "head", or the transformers engine.'
        )
    return value


def _refusals(config: Any) -> Iterator[str]:
    """Why steering would be wrong, or silently left out, under a VllmConfig."""
    from infer_align.vllm.compat import verification_rows  # noqa: PLC0415 - not before an engine starts

    parallel, speculative = config.parallel_config, config.speculative_config
    if parallel.enable_batch_sharded_sampling:
        yield "enable_batch_sharded_sampling gives a worker other rows to sample than it has states of; set it to false."
    if (
        parallel.distributed_executor_backend == "external_launcher"
        and parallel.pipeline_parallel_size > 1
    ):
        yield "distributed_executor_backend = 'external_launcher' with pipeline_parallel_size > 1 samples where no states are."
    if config.model_config.is_diffusion:
        yield "a diffusion model samples in its own way, past all logits processors."
    if speculative is None:
        return
    if not config.use_v2_model_runner:
        yield "speculative_config: vLLM's V1 model runner has no custom logits processors with speculative decoding; leave it out."
    rows = config.scheduler_config.max_num_seqs * (speculative.num_speculative_tokens + 1)
    limit = verification_rows(config.model_config.get_vocab_size())
    if rows > limit:
        yield (
            f"speculative_config: {config.scheduler_config.max_num_seqs} sequences of {speculative.num_speculative_tokens} + 1 "
            f"tokens are {rows} rows of logits, over the {limit} that vLLM verifies at once for this vocabulary; "
            f"set max_num_seqs to {max(1, limit // (speculative.num_speculative_tokens + 1))} or less."
        )


def _digest(model_config: Any) -> str:
    from infer_align.vllm.compat import vocabulary_of  # noqa: PLC0415 - not before an engine starts

    return tokenizer_digest(vocabulary_of(model_config))
