"""A sentence encoder: turns texts into unit vectors whose products say how alike they are.

It is a transformer whose token states are averaged, as all-MiniLM-L6-v2 and its kin are used. The
library sentence-transformers does the same for many more kinds of pooling; it would add its own
dependencies for the one kind that is read here, and a model with another kind is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from infer_align.checkpoints.complete import check_complete
from infer_align.checkpoints.errors import LOAD_ERRORS
from infer_align.demo.locate import locate
from infer_align.errors import ConfigError
from infer_align.rewards._torch import pick_device, position_count
from infer_align.types import Array

BATCH = 32
# Files beside a sentence encoder, by sentence-transformers.
_LIMITS = "sentence_bert_config.json"
_POOLING = "1_Pooling/config.json"
_MEAN = "pooling_mode_mean_tokens"


class SentenceEncoder:
    """A loaded encoder.

    Attributes:
        max_length: number of tokens that it reads of a text; the rest is cut off.
    """

    def __init__(self, model: str, device: str) -> None:
        """Load the encoder from a path or a Hugging Face id.

        Raises:
            ConfigError: it cannot be loaded, or it is no encoder that averages its token states.
        """
        path = locate(model)
        _check_pooling(path)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
            loaded, loading = AutoModel.from_pretrained(
                path, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except LOAD_ERRORS as error:
            raise ConfigError(
                f"agreement: {model!r} cannot be loaded as a sentence encoder: {error}"
            ) from error
        # The pooler is not read.
        missing = [name for name in loading["missing_keys"] if not name.startswith("pooler.")]
        check_complete("agreement", model, "encoder", {**loading, "missing_keys": missing})
        self._model: Any = loaded.to(pick_device(device)).eval()
        limits = [_saved_limit(path), position_count(loaded), self._tokenizer.model_max_length]
        self.max_length = min(int(limit) for limit in limits if limit)
        if self._tokenizer.pad_token is None:
            # Padding is masked, so that any token will do.
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.unk_token

    def embed(self, texts: Sequence[str]) -> Array:
        """Return [N, D] unit vectors. A text without tokens has a vector of zeros."""
        rows: list[Array] = []
        for start in range(0, len(texts), BATCH):
            rows.append(self._embed(list(texts[start : start + BATCH])))
        return np.concatenate(rows) if rows else np.zeros((0, 1))

    def is_truncated(self, text: str) -> bool:
        """Return True if the encoder reads only the beginning of a text."""
        ids = self._tokenizer(text, verbose=False)["input_ids"]
        return len(ids) > self.max_length

    @torch.inference_mode()
    def _embed(self, texts: list[str]) -> Array:
        encoded = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self._model.device)
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        if not ids.shape[1]:
            return np.zeros((len(texts), self._model.config.hidden_size))
        states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        means = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
        vectors: Array = torch.nn.functional.normalize(means, dim=1).double().cpu().numpy()
        return vectors


def _saved_limit(path: str) -> int | None:
    limit = _read(path, _LIMITS).get("max_seq_length")
    return limit if isinstance(limit, int) and limit > 0 else None


def _check_pooling(path: str) -> None:
    pooling = _read(path, _POOLING)
    if pooling and not pooling.get(_MEAN):
        used = [name for name, value in pooling.items() if value is True]
        raise ConfigError(
            f"agreement: {path!r} pools its token states by {', '.join(used) or 'another rule'}, "
            "but only the mean is supported; use an encoder such as all-MiniLM-L6-v2."
        )


def _read(path: str, name: str) -> dict[str, Any]:
    try:
        content = json.loads((Path(path) / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # A Hugging Face id, or an encoder that was saved without the file.
        return {}
    return content if isinstance(content, dict) else {}
