"""Reward models inside vLLM, one pooling engine each: large ones, on GPUs, scored while other candidates are still decoded.

Text, members and attributes are those of `classifier`; scores are the raw logits. The engines load one after the other, each into
its own share of the GPUs' memory: gpu_memory_utilization, or kv_cache_memory_bytes beside the weights.
"""

# ruff: noqa: PLC0415 - importing vLLM takes ten seconds and more: not before it starts
from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from infer_align.demo.locate import locate
from infer_align.errors import AlignError, ConfigError, Unavailable
from infer_align.rewards import Reward, RewardScores
from infer_align.rewards._conversation import encode, turns
from infer_align.rewards._models import member_names
from infer_align.rewards._scaling import SCALING, Scaling, check_scaling, scale_scores
from infer_align.types import Array, Candidate, Messages, ScoringUsage
from infer_align.vllm import package as vllm_package


@dataclass(frozen=True, slots=True)
class Pooling:
    """One or more reward models as vLLM pooling engines; members and attributes as for `classifier`."""

    model: str | None = field(default=None, metadata={"description": "path or hub id of one model"})
    models: tuple[str, ...] = field(
        default=(), metadata={"description": "several: each is a member of the ensemble"}
    )
    attributes: tuple[str, ...] = field(
        default=(),
        metadata={"description": "names of the labels, when they are objectives, not members"},
    )
    scaling: dict[str, Scaling] = field(default_factory=dict, metadata=SCALING)
    description: str = field(default="", metadata={"description": "one line for people"})
    max_length: int = field(
        default=4096,
        metadata={
            "ge": 8,
            "description": "tokens read; a longer text loses its beginning, and the score says so",
        },
    )
    timeout_seconds: float = field(
        default=60.0,
        metadata={"gt": 0, "description": "after this a candidate counts as not scored"},
    )
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "rest": vllm_package.option_names,
            "description": "not written as such: every option of vLLM's engine stands here by its own name, such as "
            "gpu_memory_utilization, and holds for each of the models",
        },
    )

    def load(self) -> PoolingReward:
        """The reward, its models not yet loaded.

        Raises:
            ConfigError: neither or both of model and models are given, or vLLM is not installed.
        """
        if bool(self.model) == bool(self.models):
            raise ConfigError("pooling: give either model or models.")
        check_scaling("pooling", self.scaling, self.attributes)
        vllm_package.require()
        return PoolingReward(self)

    @property
    def memory_share(self) -> float | None:
        """Of the GPUs' memory, what the engines of this section take together."""
        return vllm_package.memory_share(self.options, len(self.models) or 1)


plugin = Pooling


class PoolingReward(Reward):
    """An ensemble of pooling engines; vLLM batches the candidates of all requests."""

    pipelined: ClassVar[bool] = True

    def __init__(self, config: Pooling) -> None:
        self.config = config
        self.attributes = config.attributes
        self.timeout_seconds = config.timeout_seconds
        self._models: list[_RewardModel] = []
        self._closed = False

    async def start(self) -> None:
        """Load the models, one after the other: each measures what memory is left.

        Raises:
            ConfigError: a model cannot be loaded, or its labels do not fit `attributes`.
        """
        paths = self.config.models or (self.config.model or "",)
        for path in paths:
            self._models.append(model := await asyncio.to_thread(_RewardModel, path, self.config))
            await model.check()
        names = [Path(path).name for path in paths]
        self.members = member_names(
            names, [model.labels for model in self._models], self.attributes
        )
        self.description = (
            self.config.description or f"reward model ensemble: {', '.join(self.members)}"
        )

    async def close(self) -> None:
        """End the engines; what they are scoring fails."""
        self._closed = True
        while self._models:
            await self._models.pop().close()

    def health(self) -> str | None:
        """None while all its engines live."""
        dead = [model.path for model in self._models if model.errored]
        return f"vLLM's engine of {dead[0]} has died; its log says why" if dead else None

    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        """[A, K, N] logits, all candidates by all models at once; a text that could not be read is NaN and says why.

        Raises:
            Unavailable: closed, or an engine has died.
        """
        if self._closed:
            raise Unavailable("the reward was shut down")
        if not candidates:
            return RewardScores(np.empty((max(1, len(self.attributes)), len(self.members), 0)))
        conversations = [turns(messages, candidate.text) for candidate in candidates]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    [group.create_task(model.score(text)) for model in self._models]
                    for text in conversations
                ]
        except ExceptionGroup as failures:  # one engine is gone: say it as if it were alone
            raise failures.exceptions[0] from None
        marks = [[task.result() for task in row] for row in tasks]
        # [labels] per model -> [A, K]: labels are the objectives, or more members of the only one.
        values = [
            np.stack([m.logits for m in row], axis=1)
            if self.attributes
            else np.concatenate([m.logits for m in row])[None]
            for row in marks
        ]
        notes = tuple(next((mark.note for mark in row if mark.note), None) for row in marks)
        marked = scale_scores(np.stack(values, axis=-1), self.config.scaling, self.attributes)
        return RewardScores(
            marked, ScoringUsage(sum(mark.tokens for row in marks for mark in row)), notes
        )


class _Mark(NamedTuple):
    logits: Array  # [labels]
    tokens: int
    note: str | None


class _RewardModel:
    """One pooling engine with its tokenizer."""

    def __init__(self, path: str, config: Pooling) -> None:
        from transformers import AutoTokenizer

        from infer_align.vllm import compat as vllm_compat

        located = locate(path)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(located)
            self._engine = vllm_compat.launch_pooling(located, config.options)
        except AlignError:
            raise
        except Exception as error:  # whatever a worker died of
            raise ConfigError(
                f"pooling: {path!r} cannot be loaded as a sequence classifier: {error}"
            ) from error
        self.labels, context = vllm_compat.labels_and_context(self._engine)
        self.path, self.attributes = path, config.attributes
        self.max_length = min(config.max_length, context, self.tokenizer.model_max_length)
        self._names = itertools.count()

    async def check(self) -> None:
        """Refuse what its logits would not be good for.

        Raises:
            ConfigError: no logits per sequence, or not as many as there are names for.
        """
        from infer_align.vllm.compat import classifies

        if not await classifies(self._engine):
            raise ConfigError(
                f"pooling: {self.path!r} does not classify sequences; it may score each token, which is not read here."
            )
        if self.attributes and len(self.attributes) != self.labels:
            raise ConfigError(
                f"pooling.attributes: {len(self.attributes)} names for the {self.labels} labels of {self.path!r}."
            )

    @property
    def errored(self) -> bool:
        """Whether its engine has died."""
        return bool(self._engine.errored)

    async def close(self) -> None:
        """End the engine's processes."""
        from infer_align.vllm.compat import shut_down

        await shut_down(self._engine)

    async def score(self, conversation: list[dict[str, Any]]) -> _Mark:
        """The logits of one conversation.

        Raises:
            Unavailable: the engine has died.
        """
        from infer_align.vllm.compat import class_logits

        ids, note = await asyncio.to_thread(encode, self.tokenizer, conversation, self.max_length)
        unread = np.full(self.labels, np.nan)
        if not ids:
            return _Mark(unread, 0, note)
        try:
            return _Mark(
                np.array(await class_logits(self._engine, ids, f"score-{next(self._names)}")),
                len(ids),
                note,
            )
        except Unavailable:
            raise
        except AlignError as error:  # this text alone
            return _Mark(unread, 0, error.message)
