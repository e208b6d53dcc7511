"""A frozen text encoder: it turns texts, and answers within their conversation, into vectors.

It is any model of transformers whose token states are pooled: a sentence encoder such as
all-MiniLM-L6-v2, or a language model. The library sentence-transformers does the same for texts
alone. It does not pool the tokens of an answer that is read after its prompt, and a language model
in it needs a configuration of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from infer_align.checkpoints.complete import check_complete
from infer_align.checkpoints.errors import LOAD_ERRORS
from infer_align.checkpoints.model_folder import model_folder
from infer_align.errors import ConfigError
from infer_align.messages import transcript
from infer_align.rewards._torch import pick_device, position_count
from infer_align.types import Array, Messages

Pooling: TypeAlias = Literal["mean", "last"]
BATCH = 32
# Files beside a sentence encoder, by sentence-transformers.
_LIMITS = "sentence_bert_config.json"
_POOLING = "1_Pooling/config.json"
_MEAN = "pooling_mode_mean_tokens"
# The prompt may lose its beginning, but no more of it than leaves this share of the room.
PROMPT_SHARE = 0.25
# A language model reads a dialogue as lines of text. A sentence encoder reads it so, too.
ANSWER_MARK = "\nassistant: "


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """The model that encodes texts, and how its token states become one vector.

    Attributes:
        model: a name that `model_folder` reads.
        pooling: the mean of the token states, or the state of the last token.
        layer: number of the layer whose states are pooled, from 1; None for the last one.
            The layers above it are not computed.
        max_length: maximum number of tokens that are read; None for what the model can read.
    """

    model: str
    pooling: Pooling = "mean"
    layer: int | None = None
    max_length: int | None = None


class EncodedAnswer(NamedTuple):
    """An answer as the encoder reads it after its conversation."""

    prompt: Array  # [D], pooled over the tokens of the conversation; zeros without tokens
    answer: Array  # [D], pooled over the tokens of the answer; zeros without tokens
    tokens: int  # number of tokens that were read
    cut: int  # number of tokens that were not read

    @property
    def note(self) -> str | None:
        """Return a sentence that says so if the text was truncated, else None."""
        total = self.tokens + self.cut
        return f"truncated: read {self.tokens} of {total} tokens" if self.cut else None


class _Reading(NamedTuple):
    """The token ids of one text, and the places of its prompt and of its answer."""

    ids: list[int]
    prompt: slice
    answer: slice
    cut: int  # number of tokens that are not read


class SentenceEncoder:
    """A loaded encoder. It may be used from any thread.

    Attributes:
        size: number of entries of a vector.
        max_length: number of tokens that it reads of a text; the rest is cut off.
    """

    def __init__(self, settings: EncoderSettings, device: str, field: str) -> None:
        """Load the encoder.

        Args:
            settings: the model and its pooling.
            device: torch device, or "auto".
            field: the kind of reward, for error messages.

        Raises:
            ConfigError: it cannot be loaded, or the saved model pools its states in another way.
        """
        path = model_folder(settings.model, field)
        _check_pooling(path, settings.pooling, field)
        self._settings = settings
        # A tokenizer keeps the truncation and the padding of its last call.
        self._tokenizing = Lock()
        self._tokenizer, loaded = _load(settings, path, field)
        self._model: Any = loaded.to(pick_device(device)).eval()
        self.size = int(loaded.config.get_text_config().hidden_size)
        limits = [
            settings.max_length,
            _saved_limit(path),
            position_count(loaded),
            self._tokenizer.model_max_length,
        ]
        self.max_length = min(int(limit) for limit in limits if limit)
        if self._tokenizer.pad_token is None:
            # Padding is masked, so that any token will do.
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.unk_token
        self._before, self._after = _special_ids(self._tokenizer)

    def digest(self) -> str:
        """Return a text that is equal for encoders that give equal vectors, up to rounding."""
        total = hashlib.sha256()
        settings = {**asdict(self._settings), "model": None, "max_length": self.max_length}
        total.update(json.dumps(settings, sort_keys=True).encode())
        total.update(json.dumps(sorted(self._tokenizer.get_vocab().items())).encode())
        for name, weights in sorted(self._model.state_dict().items()):
            total.update(name.encode())
            total.update(weights.cpu().numpy().tobytes())
        return total.hexdigest()[:16]

    def embed(self, texts: Sequence[str]) -> Array:
        """Return [N, D] unit vectors of the means. A text without tokens has a vector of zeros."""
        rows: list[Array] = []
        for start in range(0, len(texts), BATCH):
            rows.append(self._embed(list(texts[start : start + BATCH])))
        return np.concatenate(rows) if rows else np.zeros((0, self.size))

    @torch.inference_mode()
    def _embed(self, texts: list[str]) -> Array:
        with self._tokenizing:
            limits = {"truncation": True, "max_length": self.max_length}
            encoded = self._tokenizer(texts, padding=True, return_tensors="pt", **limits)
        encoded = encoded.to(self._model.device)
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        if not ids.shape[1]:
            return np.zeros((len(texts), self.size))
        states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        means = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
        vectors: Array = torch.nn.functional.normalize(means, dim=1).double().cpu().numpy()
        return vectors

    def is_truncated(self, text: str) -> bool:
        """Return True if the encoder reads only the beginning of a text."""
        return len(self._ids(text, special=True)) > self.max_length

    def encode(self, dialogues: Sequence[tuple[Messages, str]]) -> list[EncodedAnswer]:
        """Return the vectors of answers, each read once after its conversation.

        Args:
            dialogues: conversations, each with one answer to it.
        """
        readings = [self._reading(messages, answer) for messages, answer in dialogues]
        # Rows of about one length are read together, so that little padding is read.
        order = sorted(range(len(readings)), key=lambda index: len(readings[index].ids))
        encoded: dict[int, EncodedAnswer] = {}
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            results = self._forward([readings[index] for index in batch])
            encoded.update(zip(batch, results, strict=True))
        return [encoded[index] for index in range(len(readings))]

    def _ids(self, text: str, *, special: bool) -> list[int]:
        with self._tokenizing:
            # `verbose` would print a warning for every text over the tokenizer's own limit.
            encoded = self._tokenizer(text, add_special_tokens=special, verbose=False)
        ids: list[int] = encoded["input_ids"]
        return ids

    def _reading(self, messages: Messages, answer: str) -> _Reading:
        """Return the ids of a conversation and an answer, cut to what the encoder reads.

        A conversation loses its beginning, an answer its end.
        """
        prompt: list[int] = []
        if messages:
            prompt = self._ids(transcript(messages) + ANSWER_MARK, special=False)
        text = self._ids(answer, special=False)
        total = len(prompt) + len(text)
        room = max(2, self.max_length - len(self._before) - len(self._after))
        # The prompt is sure of a share of the room. The answer may take the rest, and the prompt
        # what the answer leaves.
        reserved = min(len(prompt), int(PROMPT_SHARE * room))
        text = text[: room - reserved]
        excess = len(prompt) + len(text) - room
        prompt = prompt[max(0, excess) :]
        cut = total - len(prompt) - len(text)
        ids = [*self._before, *prompt, *text, *self._after]
        start = len(self._before)
        border = start + len(prompt)
        return _Reading(ids, slice(start, border), slice(border, border + len(text)), cut)

    @torch.inference_mode()
    def _forward(self, readings: Sequence[_Reading]) -> list[EncodedAnswer]:
        """Read several texts in one forward pass. Shorter ones are padded on the right."""
        width = max(1, *(len(reading.ids) for reading in readings))
        ids = torch.full((len(readings), width), int(self._tokenizer.pad_token_id or 0))
        mask = torch.zeros_like(ids)
        for row, reading in enumerate(readings):
            ids[row, : len(reading.ids)] = torch.tensor(reading.ids, dtype=ids.dtype)
            mask[row, : len(reading.ids)] = 1
        device = self._model.device
        output = self._model(input_ids=ids.to(device), attention_mask=mask.to(device))
        states: Array = output.last_hidden_state.float().cpu().numpy()
        encoded: list[EncodedAnswer] = []
        for row, reading in zip(states, readings, strict=True):
            prompt = self._pooled(row[reading.prompt])
            answer = self._pooled(row[reading.answer])
            encoded.append(EncodedAnswer(prompt, answer, len(reading.ids), reading.cut))
        return encoded

    def _pooled(self, states: Array) -> Array:
        """Return the vector of some tokens: [T, D] -> [D]."""
        if not len(states):
            return np.zeros(self.size)
        vector = states[-1] if self._settings.pooling == "last" else states.mean(axis=0)
        return np.asarray(vector, dtype=np.float64)


def _load(settings: EncoderSettings, path: str, field: str) -> tuple[Any, Any]:
    """Load the tokenizer and the model, without the layers above the one that is pooled.

    Raises:
        ConfigError: it is no model of token states, or has no such layer.
    """
    model = settings.model
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        loaded, loading = AutoModel.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except LOAD_ERRORS as error:
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"{field}: {model!r} cannot be loaded as a sentence encoder: {cause}"
        ) from error
    # The pooler is not read.
    missing = [name for name in loading["missing_keys"] if not name.startswith("pooler.")]
    check_complete(field, model, "encoder", {**loading, "missing_keys": missing})
    if settings.layer is not None:
        _cut_layers(model, settings.layer, loaded, field)
    return tokenizer, loaded


def _cut_layers(name: str, count: int, model: Any, field: str) -> None:
    """Remove the layers above the one that is pooled. Its states then are the last ones."""
    inner = getattr(model, "encoder", model)
    attribute = "layers" if hasattr(inner, "layers") else "layer"
    layers = getattr(inner, attribute, None)
    if layers is None:
        raise ConfigError(
            f"{field}: layer is {count}, but the layers of {name!r} ({type(model).__name__}) "
            "cannot be cut; leave layer out."
        )
    if not 1 <= count <= len(layers):
        raise ConfigError(
            f"{field}: layer is {count}, but {name!r} has the layers 1 to {len(layers)}."
        )
    setattr(inner, attribute, layers[:count])


def _special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["special_tokens_mask"]
    if 0 not in mask:
        return [], []
    start = mask.index(0)
    end = len(mask) - mask[::-1].index(0)
    return ids[:start], ids[end:]


def _saved_limit(path: str) -> int | None:
    limit = _read(path, _LIMITS).get("max_seq_length")
    return limit if isinstance(limit, int) and limit > 0 else None


def _check_pooling(path: str, pooling: Pooling, field: str) -> None:
    saved = _read(path, _POOLING)
    if pooling == "mean" and saved and not saved.get(_MEAN):
        used = [name for name, value in saved.items() if value is True]
        raise ConfigError(
            f"{field}: {path!r} pools its token states by {', '.join(used) or 'another rule'}, "
            "but only the mean is supported; use an encoder such as all-MiniLM-L6-v2."
        )


def _read(path: str, name: str) -> dict[str, Any]:
    try:
        content = json.loads((Path(path) / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # A Hugging Face id, or an encoder that was saved without the file.
        return {}
    return content if isinstance(content, dict) else {}
