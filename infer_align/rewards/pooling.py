"""Reward models that vLLM runs, each in a pooling engine of its own.

Use it for large reward models on GPUs: candidates are scored while others are still decoded. Text,
members and attributes are the same as for `classifier`. Scores are raw logits.

The engines load one after the other. Each takes its own share of the GPUs' memory, by
gpu_memory_utilization, or by kv_cache_memory_bytes in addition to its weights.
"""

# ruff: noqa: PLC0415 - importing vLLM takes ten seconds or more, so it waits for the start
from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from infer_align.demo.locate import locate
from infer_align.errors import AlignError, ConfigError, Unavailable
from infer_align.messages import Conversation
from infer_align.rewards import RewardScores
from infer_align.rewards._conversation import turns
from infer_align.rewards._encoding import PROBE, make_encoder
from infer_align.rewards._labels import Labels
from infer_align.rewards._models import RewardModelEnsemble, RewardModelSection, TextScore
from infer_align.types import Candidate, Messages
from infer_align.vllm import package as vllm_package


@dataclass(frozen=True, slots=True)
class Pooling(RewardModelSection):
    """Reward models in vLLM pooling engines, for large models on GPUs."""

    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "rest": vllm_package.option_names,
            "description": "Put any engine option of vLLM directly in this section, under its vLLM "
            "name, such as gpu_memory_utilization. It applies to the engine of each model.",
        },
    )

    def load(self) -> PoolingReward:
        """Make the reward; its models load at start.

        Raises:
            ConfigError: neither or both of `model` and `models` are set, or vLLM is not installed.
        """
        self.check_models("pooling")
        vllm_package.require()
        return PoolingReward(self)

    @property
    def memory_share(self) -> float | None:
        """Return the share of the GPUs' memory that all engines of this section take together."""
        return vllm_package.memory_share(self.options, len(self.paths))


plugin = Pooling


class PoolingReward(RewardModelEnsemble["_PoolingModel"]):
    """An ensemble of pooling engines. vLLM batches the candidates of all requests."""

    kind = "pooling"
    pipelined: ClassVar[bool] = True
    config: Pooling

    async def _load(self, path: str) -> _PoolingModel:
        return await asyncio.to_thread(_PoolingModel, path, self.config)

    async def _check(self, model: _PoolingModel) -> None:
        await model.check()

    async def _probe(self, model: _PoolingModel) -> TextScore:
        return await model.score(PROBE)

    async def close(self) -> None:
        """End the engines. Texts that they are scoring fail."""
        self._closed = True
        while self._models:
            await self._models.pop().close()

    def health(self) -> str | None:
        """Return None while all engines live, else which one has died."""
        for model in self._models:
            if model.errored:
                return f"vLLM's engine of {model.path} has stopped; see its log for the cause"
        return None

    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        """Return [A, K, N] scaled logits. A text that cannot be read is NaN, with a note.

        Raises:
            Unavailable: the reward is closed, or an engine has died.
        """
        self._check_open()
        rows: list[list[asyncio.Task[TextScore]]] = []
        try:
            async with asyncio.TaskGroup() as group:
                for candidate in candidates:
                    text = turns(messages, candidate)
                    tasks = [group.create_task(model.score(text)) for model in self._models]
                    rows.append(tasks)
        except ExceptionGroup as errors:
            # One dead engine fails many tasks with the same error.
            raise errors.exceptions[0] from None
        scores: list[list[TextScore]] = []
        for tasks in rows:
            scores.append([task.result() for task in tasks])
        return self._combine(scores)


class _PoolingModel:
    """One pooling engine with its tokenizer."""

    def __init__(self, path: str, config: Pooling) -> None:
        """Load the model. Blocks for seconds to minutes.

        Raises:
            ConfigError: vLLM cannot load the model as a sequence classifier.
        """
        from transformers import AutoTokenizer

        from infer_align.vllm import compat

        self.path = path
        located = locate(path)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(located)
            self._engine = compat.launch_pooling(located, config.options)
        except AlignError:
            raise
        except Exception as error:
            # A worker may die of any error.
            raise ConfigError(
                f"pooling: {path!r} cannot be loaded as a sequence classifier: {error}"
            ) from error
        self.labels = Labels.of(compat.classifier_config(self._engine))
        self.encoder = make_encoder(
            self.tokenizer,
            config.chat_template,
            [config.max_length, compat.readable_tokens(self._engine)],
            self._engine.model_config.get_vocab_size(),
            add_special_tokens=config.add_special_tokens,
        )
        self._request_numbers = itertools.count()

    async def check(self) -> None:
        """Refuse a model whose logits are not one row per text.

        Raises:
            ConfigError: the model scores each token, for example.
        """
        from infer_align.vllm import compat

        if not await compat.classifies_sequences(self._engine):
            raise ConfigError(
                f"pooling: {self.path!r} does not classify sequences. Models that score each token "
                "are not supported; choose a sequence classifier."
            )

    @property
    def errored(self) -> bool:
        """Return True if the engine has died."""
        return self._engine.errored

    async def close(self) -> None:
        """End the engine's processes."""
        from infer_align.vllm import compat

        await compat.shut_down(self._engine)

    async def score(self, conversation: Conversation) -> TextScore:
        """Return the logits of one conversation; NaN with a note if vLLM refuses this text.

        Raises:
            Unavailable: the engine has died.
        """
        from infer_align.vllm import compat

        # Encoding blocks, and long texts take milliseconds.
        ids, note = await asyncio.to_thread(self.encoder.encode, conversation)
        unscored = np.full(len(self.labels.names), np.nan)
        if not ids:
            return TextScore(unscored, 0, note)
        request_id = f"score-{next(self._request_numbers)}"
        try:
            logits = await compat.class_logits(self._engine, ids, request_id)
        except Unavailable:
            raise
        except AlignError as error:
            return TextScore(unscored, 0, error.message)
        return TextScore(np.array(logits), len(ids), note)
