"""Reward models: any sequence classifier that transformers loads, alone or as an ensemble.

Text is the conversation with the candidate as its last turn, through the model's chat template. Scores are the raw logits.
Candidates of all requests that are waiting are scored in one batch, sorted by length.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from infer_align.demo.locate import locate
from infer_align.errors import ConfigError, Unavailable
from infer_align.rewards import Reward, RewardScores
from infer_align.rewards._conversation import Encoded, encode, member_names, turns
from infer_align.rewards._scaling import SCALING, Scaling, check_scaling, scaled
from infer_align.types import Array, Candidate, Messages, ScoringUsage


@dataclass(frozen=True, slots=True)
class Classifier:
    """One or more reward models. A model with K labels is K members; with `attributes`, its labels are those objectives instead."""

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
    batch_size: int = field(default=32, metadata={"ge": 1, "description": "texts per forward"})
    dtype: str = field(default="auto", metadata={"description": "torch dtype of the weights"})
    device: str = field(
        default="auto", metadata={"description": '"auto" takes a GPU when there is one'}
    )
    timeout_seconds: float = field(
        default=60.0,
        metadata={"gt": 0, "description": "after this a candidate counts as not scored"},
    )

    def load(self) -> ClassifierReward:
        """The reward, its models not yet loaded.

        Raises:
            ConfigError: neither or both of model and models are given.
        """
        if bool(self.model) == bool(self.models):
            raise ConfigError("classifier: give either model or models.")
        check_scaling("classifier", self.scaling, self.attributes)
        return ClassifierReward(self)


plugin = Classifier


class _Text(NamedTuple):
    """One candidate waiting to be scored by every model."""

    messages: list[dict[str, Any]]
    done: asyncio.Future[tuple[Array, int, str | None]]  # ([A, K], tokens, note)


class ClassifierReward(Reward):
    """An ensemble of reward models behind one queue."""

    def __init__(self, config: Classifier) -> None:
        self.config = config
        self.attributes = config.attributes
        self.timeout_seconds = config.timeout_seconds
        self._paths = config.models or (config.model or "",)
        self._models: list[_RewardModel] = []
        self._waiting: list[_Text] = []
        self._worker: asyncio.Task[None] | None = None
        self._closed = False
        # One thread: torch already uses every core that it was given.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="classifier")

    async def start(self) -> None:
        """Load the models.

        Raises:
            ConfigError: a model cannot be loaded, or its labels do not fit `attributes`.
        """
        load = asyncio.get_running_loop().run_in_executor
        self._models = [
            await load(self._thread, _RewardModel, path, self.config) for path in self._paths
        ]
        names = [Path(path).name for path in self._paths]
        self.members = member_names(
            names, [model.labels for model in self._models], self.attributes
        )
        self.description = (
            self.config.description or f"reward model ensemble: {', '.join(self.members)}"
        )

    async def close(self) -> None:
        """Refuse what waits and free the models."""
        self._closed = True
        for text in self._waiting:
            if not text.done.done():
                text.done.set_exception(Unavailable("the reward was shut down"))
        await asyncio.to_thread(self._thread.shutdown)
        self._models.clear()

    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        """[A, K, N] logits, scaled; a text that could not be read is NaN and says why.

        Raises:
            Unavailable: closed.
        """
        if self._closed:
            raise Unavailable("the reward was shut down")
        if not candidates:
            return RewardScores(np.empty((max(1, len(self.attributes)), len(self.members), 0)))
        loop = asyncio.get_running_loop()
        texts = [_Text(turns(messages, c.text), loop.create_future()) for c in candidates]
        self._waiting += texts
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        results = await asyncio.gather(*(text.done for text in texts))
        values = scaled(
            np.stack([value for value, _, _ in results], axis=-1),
            self.config.scaling,
            self.attributes,
        )
        return RewardScores(
            values,
            ScoringUsage(sum(tokens for _, tokens, _ in results)),
            tuple(note for _, _, note in results),
        )

    async def _work(self) -> None:
        """Score whatever is waiting, batch after batch, until nothing is."""
        loop = asyncio.get_running_loop()
        while batch := [text for text in self._waiting if not text.done.done()][
            : self.config.batch_size
        ]:
            taken = {id(text) for text in batch}
            self._waiting = [
                text for text in self._waiting if id(text) not in taken and not text.done.done()
            ]
            try:
                results = await loop.run_in_executor(
                    self._thread, self._forward, [text.messages for text in batch]
                )
            except (
                Exception
            ) as error:  # told to every request in the batch; the worker lives on for the next
                results = [error] * len(batch)
            for text, result in zip(batch, results, strict=True):
                if text.done.done():
                    continue  # cancelled meanwhile
                if isinstance(result, Exception):
                    text.done.set_exception(result)
                else:
                    text.done.set_result(result)

    def _forward(
        self, conversations: list[list[dict[str, Any]]]
    ) -> list[tuple[Array, int, str | None] | Exception]:
        encoded: dict[object, list[Encoded]] = {}  # members of one ensemble mostly read alike
        for model in self._models:
            if model.reads not in encoded:
                encoded[model.reads] = [
                    encode(model.tokenizer, messages, model.max_length)
                    for messages in conversations
                ]
        per_model = [model.score(encoded[model.reads]) for model in self._models]
        results: list[tuple[Array, int, str | None] | Exception] = []
        for marks in zip(*per_model, strict=True):
            logits = [mark.logits for mark in marks]
            # [labels] per model -> [A, K]: labels are the objectives, or more members of the only one.
            values = np.stack(logits, axis=1) if self.attributes else np.concatenate(logits)[None]
            results.append(
                (
                    values,
                    sum(mark.tokens for mark in marks),
                    next((mark.note for mark in marks if mark.note), None),
                )
            )
        return results


class _Mark(NamedTuple):
    logits: Array  # [labels]
    tokens: int
    note: str | None


class _RewardModel:
    """One model with its tokenizer."""

    def __init__(self, path: str, config: Classifier) -> None:
        path = locate(path)
        device = (
            ("cuda" if torch.cuda.is_available() else "cpu")
            if config.device == "auto"
            else config.device
        )
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=config.dtype, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"classifier: {path!r} cannot be loaded as a sequence classifier: {error}"
            ) from error
        if missing := sorted(loaded["missing_keys"]):  # transformers would make them up, at random
            raise ConfigError(
                f"classifier: {path!r} is no sequence classifier: it has no weights for {', '.join(missing[:3])}."
            )
        self.model = model.to(device).eval()
        self.labels = int(self.model.config.num_labels)
        if config.attributes and len(config.attributes) != self.labels:
            raise ConfigError(
                f"classifier.attributes: {len(config.attributes)} names for the {self.labels} labels of {path!r}."
            )
        self.config = self.model.config.get_text_config()
        positions = getattr(self.config, "max_position_embeddings", None) or config.max_length
        self.max_length = min(config.max_length, positions, self.tokenizer.model_max_length)
        given = self.config.pad_token_id
        self.pad = None if given is None or given < 0 else int(given)

        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        # What makes a conversation into tokens: models that have it in common read the same.
        self.reads = (
            self.tokenizer.chat_template,
            self.max_length,
            backend.to_str() if backend else id(self.tokenizer),
        )

    @torch.inference_mode()
    def score(self, encoded: Sequence[Encoded]) -> list[_Mark]:
        """Logits of each conversation; rows are sorted by length so that little is padding."""
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
        width = max(1, *(len(ids) for ids, _ in encoded))
        ids = torch.full((len(encoded), width), self._padding([ids for ids, _ in encoded]))
        mask = torch.zeros_like(ids)
        for row, i in enumerate(order):
            length = len(encoded[i][0])
            ids[row, :length] = torch.tensor(encoded[i][0])
            mask[row, :length] = 1
        device = self.model.device
        logits = (
            self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
            .logits.double()
            .cpu()
            .numpy()
        )
        marks: list[_Mark] = [_Mark(logits[0], 0, None)] * len(encoded)
        for row, i in enumerate(order):
            tokens, note = encoded[i]
            marks[i] = _Mark(
                logits[row] if tokens else np.full(self.labels, np.nan), len(tokens), note
            )
        return marks

    def _padding(self, rows: list[list[int]]) -> int:
        """The token to pad with. Decoder classifiers read a row at its last token that is not the padding.

        Without a padding token of its own, the model reads the last token whatever it is: then the padding must be none of those.
        """
        if self.pad is None:
            last = {ids[-1] for ids in rows if ids}
            self.config.pad_token_id = next(
                token for token in range(len(last) + 1) if token not in last
            )
        return int(self.config.pad_token_id)
