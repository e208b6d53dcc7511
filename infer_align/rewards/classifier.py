"""Score with sequence classifiers that transformers loads, alone or as an ensemble.

The text is the conversation with the candidate as its last turn, see `_encoding`. Scores are the
raw logits. Candidates of all waiting requests are scored in one batch, sorted by length. A text
that cannot be read fails alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from infer_align.checkpoints.complete import check_complete
from infer_align.checkpoints.errors import LOAD_ERRORS
from infer_align.checkpoints.rope import by_rope_factors
from infer_align.checkpoints.threads import compute_alone
from infer_align.demo.locate import locate
from infer_align.errors import ConfigError, Unavailable
from infer_align.messages import Conversation
from infer_align.rewards import ComparableReward, RewardScores
from infer_align.rewards._conversation import turns
from infer_align.rewards._encoding import PROBE, Encoded, make_encoder
from infer_align.rewards._labels import Labels
from infer_align.rewards._models import RewardModelEnsemble, RewardModelSection, TextScore
from infer_align.rewards._torch import pick_device, position_count
from infer_align.types import Array, Candidate, Messages

log = logging.getLogger(__name__)

TextScores: TypeAlias = list[TextScore]  # of one text, one per model


@dataclass(frozen=True, slots=True)
class Classifier(RewardModelSection):
    """One or more reward models, run by transformers in this process."""

    batch_size: int = field(
        default=32, metadata={"ge": 1, "description": "Maximum number of texts in one forward."}
    )
    dtype: str = field(
        default="auto", metadata={"description": 'torch dtype of the weights, such as "float32".'}
    )
    device: str = field(
        default="auto",
        metadata={"description": 'torch device. "auto" is a GPU if there is one, else the CPU.'},
    )

    def load(self) -> ClassifierReward:
        """Return the reward. Its models are loaded by `start`.

        Raises:
            ConfigError: neither or both of `model` and `models` are set, or `scaling` names an
                unknown attribute.
        """
        self.check_models("classifier")
        return ClassifierReward(self)


plugin = Classifier


class _WaitingText(NamedTuple):
    """One candidate that waits to be scored by every model."""

    messages: Conversation
    done: asyncio.Future[TextScores]


class ClassifierReward(RewardModelEnsemble["_TorchModel"], ComparableReward):
    """An ensemble of reward models that share one queue of waiting texts."""

    kind = "classifier"
    config: Classifier

    def __init__(self, config: Classifier) -> None:
        super().__init__(config)
        self._waiting: list[_WaitingText] = []
        self._worker: asyncio.Task[None] | None = None
        # One thread is enough: torch uses every core by itself where that pays.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="classifier")

    async def start(self) -> None:
        """Load the models, and set the CPU threads that they are worth.

        Raises:
            ConfigError: see `RewardModelEnsemble.start`.
        """
        await super().start()
        models = [model.model for model in self._models]
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, compute_alone, models)

    async def _load(self, path: str) -> _TorchModel:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, _TorchModel, path, self.config)

    async def _probe(self, model: _TorchModel) -> TextScore:
        loop = asyncio.get_running_loop()
        encoded = [model.encoder.encode(PROBE)]
        return (await loop.run_in_executor(self._thread, model.score, encoded))[0]

    async def close(self) -> None:
        """Fail the waiting texts and free the models."""
        self._closed = True
        for text in self._waiting:
            if not text.done.done():
                text.done.set_exception(Unavailable("the reward was shut down"))
        await asyncio.to_thread(self._thread.shutdown)
        self._models.clear()

    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        """Return [A, K, N] scaled logits. A text that cannot be read is NaN, with a note.

        Raises:
            Unavailable: the reward is closed.
        """
        self._check_open()
        if not candidates:
            return self._combine([])
        loop = asyncio.get_running_loop()
        texts: list[_WaitingText] = []
        for candidate in candidates:
            conversation = turns(messages, candidate)
            texts.append(_WaitingText(conversation, loop.create_future()))
        self._waiting += texts
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        return self._combine(await asyncio.gather(*(text.done for text in texts)))

    async def score_by_recipe(
        self, messages: Messages, candidates: Sequence[Candidate]
    ) -> RewardScores:
        """Return [A, K, N] scaled logits of the texts as most programs tokenize them.

        Raises:
            Unavailable: the reward is closed.
        """
        self._check_open()
        loop = asyncio.get_running_loop()
        rows: list[TextScores] = []
        for candidate in candidates:
            conversation = turns(messages, candidate)
            scores: TextScores = []
            for model in self._models:
                encoded = [model.encoder.encode_by_recipe(conversation)]
                scores += await loop.run_in_executor(self._thread, model.score, encoded)
            rows.append(scores)
        return self._combine(rows)

    async def _work(self) -> None:
        """Score the waiting texts, batch after batch, until none is left."""
        while batch := self._next_batch():
            for text, result in zip(batch, await self._results(batch), strict=True):
                if text.done.done():
                    continue  # The request was cancelled meanwhile.
                if isinstance(result, Exception):
                    text.done.set_exception(result)
                else:
                    text.done.set_result(result)

    def _next_batch(self) -> list[_WaitingText]:
        """Remove the next texts from the queue, and drop those of cancelled requests."""
        open_texts = [text for text in self._waiting if not text.done.done()]
        batch = open_texts[: self.config.batch_size]
        self._waiting = open_texts[self.config.batch_size :]
        return batch

    async def _results(self, batch: Sequence[_WaitingText]) -> Sequence[TextScores | Exception]:
        """Score a batch.

        An error is the result of every text in it, so that the worker goes on with the next batch.
        """
        loop = asyncio.get_running_loop()
        conversations = [text.messages for text in batch]
        try:
            return await loop.run_in_executor(self._thread, self._forward, conversations)
        except Exception as error:
            return [error] * len(batch)

    def _forward(self, conversations: Sequence[Conversation]) -> list[TextScores]:
        """Score every conversation with every model."""
        # Members of one ensemble mostly read a conversation as the same tokens: encode it once for
        # all of them.
        encoded: dict[object, list[Encoded]] = {}
        per_model: list[TextScores] = []
        for model in self._models:
            encoder = model.encoder
            if encoder.key not in encoded:
                encoded[encoder.key] = [encoder.encode(each) for each in conversations]
            per_model.append(model.score(encoded[encoder.key]))
        return [list(scores) for scores in zip(*per_model, strict=True)]


class _TorchModel:
    """One sequence classifier with its tokenizer."""

    def __init__(self, path: str, config: Classifier) -> None:
        path = locate(path)
        self.tokenizer, model = _load_classifier(path, config.dtype)
        self.model = model.to(pick_device(config.device)).eval()
        self.labels = Labels.of(self.model.config)
        self.config = self.model.config.get_text_config()
        pad = self.config.pad_token_id
        self.has_padding_token = pad is not None and pad >= 0
        self.encoder = make_encoder(
            self.tokenizer,
            config.chat_template,
            [config.max_length, position_count(self.model)],
            _vocabulary_size(self.model),
            add_special_tokens=config.add_special_tokens,
        )

    @torch.inference_mode()
    def score(self, encoded: Sequence[Encoded]) -> TextScores:
        """Return the logits of each encoded text. A text that the model cannot read is NaN.

        Equal texts are read once. The rounding of a row depends on its place in the batch, so they
        would differ in the last digits, and their order would follow from that.
        """
        texts = [(tuple(text.ids), text.note) for text in encoded]
        first: dict[tuple[tuple[int, ...], str | None], int] = {}
        for index, text in enumerate(texts):
            first.setdefault(text, index)
        # Rows are in order of length. The order of rows is part of the result, bit by bit.
        order = sorted(first.values(), key=lambda index: (len(encoded[index].ids), index))
        rows = [encoded[index] for index in order]
        try:
            logits = self._logits([row.ids for row in rows])
            results = [self._result(*row) for row in zip(rows, logits, strict=True)]
        except Exception:
            # One text may be the cause. The texts of other callers must not fail with it.
            log.exception("a batch of %d texts failed; each is read alone", len(rows))
            results = [self._score_alone(row) for row in rows]
        scores = dict(zip(order, results, strict=True))
        return [scores[first[text]] for text in texts]

    def _score_alone(self, encoded: Encoded) -> TextScore:
        """Score one text; NaN with a note if the model raises."""
        try:
            return self._result(encoded, self._logits([encoded.ids])[0])
        except Exception as error:
            note = f"the reward model cannot read the text: {type(error).__name__}: {error}"
            return TextScore(self._unscored(), 0, note)

    def _result(self, encoded: Encoded, logits: Array) -> TextScore:
        values = logits if encoded.ids else self._unscored()
        return TextScore(values, len(encoded.ids), encoded.note)

    def _unscored(self) -> Array:
        return np.full(len(self.labels.names), np.nan)

    def _logits(self, rows: Sequence[list[int]]) -> Array:
        """Run the model on rows of token ids and return [rows, labels].

        A text is read by the rotary factors of its own length, whatever else is in the batch.
        """
        logits = np.empty((len(rows), len(self.labels.names)))
        for group in by_rope_factors(self.config, [len(ids) for ids in rows]):
            logits[group] = self._forward([rows[index] for index in group])
        return logits

    def _forward(self, rows: Sequence[list[int]]) -> Array:
        """Run the model once on rows of token ids and return [rows, labels]."""
        width = max(1, *(len(ids) for ids in rows))
        input_ids = torch.full((len(rows), width), self._padding(rows))
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        device = self.model.device
        output = self.model(input_ids=input_ids.to(device), attention_mask=mask.to(device))
        logits: Array = output.logits.double().cpu().numpy()
        return logits

    def _padding(self, rows: Sequence[list[int]]) -> int:
        """Return the token to pad with.

        A decoder classifier reads a row at its last token that is not the padding token. If the
        model has no padding token, it must read the last token, whatever it is. The padding is then
        a token that ends no row.
        """
        if not self.has_padding_token:
            endings = {ids[-1] for ids in rows if ids}
            unused = (token for token in range(len(endings) + 1) if token not in endings)
            self.config.pad_token_id = next(unused)
        return int(self.config.pad_token_id)


def _vocabulary_size(model: Any) -> int | None:
    """Return the number of token ids that a model reads; None if it does not say."""
    try:
        return len(model.get_input_embeddings().weight)
    except NotImplementedError:
        # transformers finds the embedding of its own models alone.
        return getattr(model.config.get_text_config(), "vocab_size", None)


def _load_classifier(path: str, dtype: str) -> tuple[Any, Any]:
    """Load a tokenizer and its sequence classifier.

    Raises:
        ConfigError: there is no such model, it is not a sequence classifier, or it lacks weights.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except LOAD_ERRORS as error:
        raise ConfigError(
            f"classifier: {path!r} cannot be loaded as a sequence classifier: {error}"
        ) from error
    check_complete("classifier", path, "sequence classifier", loading)
    return tokenizer, model
