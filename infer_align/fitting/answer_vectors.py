"""Encode the answers of preference pairs once, and keep their vectors in a folder.

A file of the folder holds the vectors of some pairs. Its name is a digest of the encoder and of the
texts, so a run that was interrupted goes on, and a file of more pairs encodes the new ones only.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from infer_align.errors import ConfigError
from infer_align.fitting.regression import Progress
from infer_align.messages import normalize
from infer_align.preferences import PreferencePair
from infer_align.rewards._heads import View, answer_features
from infer_align.rewards._sentences import EncodedAnswer, SentenceEncoder
from infer_align.types import Array

# Pairs per file. An interruption loses the work on one file.
PAIRS_PER_FILE = 64
SIDES = ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class AnswerVectors:
    """The vectors of the answers of C pairs, as the encoder read them.

    Attributes:
        chosen: the better answers.
        rejected: the other answers.
        seconds: the time that encoding took in this run.
    """

    chosen: tuple[EncodedAnswer, ...]
    rejected: tuple[EncodedAnswer, ...]
    seconds: float

    @property
    def truncated(self) -> int:
        """Return the number of answers of which the encoder did not read every token."""
        return sum(each.note is not None for each in (*self.chosen, *self.rejected))

    @property
    def tokens(self) -> int:
        """Return the number of tokens that the encoder read."""
        return sum(each.tokens for each in (*self.chosen, *self.rejected))

    def features(self, views: Sequence[View], size: int) -> tuple[Array, Array]:
        """Return the features of the chosen and of the rejected answers: [C, F] each."""
        chosen = answer_features(self.chosen, views, size)
        return chosen, answer_features(self.rejected, views, size)


def encode_pairs(
    encoder: SentenceEncoder, pairs: Sequence[PreferencePair], folder: Path, progress: Progress
) -> AnswerVectors:
    """Return the vectors of all answers; those that the folder holds are not encoded again.

    Raises:
        ConfigError: the folder cannot be written.
    """
    digest = encoder.digest()
    answers: dict[str, list[EncodedAnswer]] = {side: [] for side in SIDES}
    start, seconds, encoded = time.monotonic(), 0.0, 0
    for first in range(0, len(pairs), PAIRS_PER_FILE):
        some = pairs[first : first + PAIRS_PER_FILE]
        file = folder / f"{_key(digest, some)}.safetensors"
        vectors = _read(file)
        if not vectors:
            _write(file, _encode(encoder, some))
            # Read again: the result is then the same, bit by bit, as that of a later run.
            vectors = _read(file)
            encoded += len(some)
            seconds = time.monotonic() - start
        for side in SIDES:
            answers[side] += vectors[side]
        end = first + len(some)
        rest = _remaining(seconds, encoded, len(pairs) - end)
        progress(f"encoding: {end} of {len(pairs)} pairs{rest}")
    return AnswerVectors(tuple(answers["chosen"]), tuple(answers["rejected"]), seconds)


def _remaining(seconds: float, done: int, rest: int) -> str:
    if not done or not rest:
        return ""
    return f", about {seconds / done * rest:.0f} s more"


def _key(digest: str, pairs: Sequence[PreferencePair]) -> str:
    texts = [[normalize(pair.messages), pair.chosen, pair.rejected] for pair in pairs]
    content = json.dumps([digest, texts], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def _encode(
    encoder: SentenceEncoder, pairs: Sequence[PreferencePair]
) -> dict[str, list[EncodedAnswer]]:
    texts = [(normalize(pair.messages), pair.chosen) for pair in pairs]
    texts += [(normalize(pair.messages), pair.rejected) for pair in pairs]
    encoded = encoder.encode(texts)
    return {"chosen": encoded[: len(pairs)], "rejected": encoded[len(pairs) :]}


def _write(file: Path, vectors: dict[str, list[EncodedAnswer]]) -> None:
    tensors: dict[str, NDArray[Any]] = {}
    for side, answers in vectors.items():
        tensors[f"{side}.prompt"] = np.stack([each.prompt for each in answers]).astype(np.float32)
        tensors[f"{side}.answer"] = np.stack([each.answer for each in answers]).astype(np.float32)
        tensors[f"{side}.counts"] = np.array([[each.tokens, each.cut] for each in answers])
    temporary = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary)
        temporary.rename(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{str(file.parent)!r}: cannot be written: {error}") from error


def _read(file: Path) -> dict[str, list[EncodedAnswer]]:
    """Return the vectors of a file; nothing if it is missing or damaged."""
    answers: dict[str, list[EncodedAnswer]] = {}
    try:
        tensors = load_file(file)
        for side in SIDES:
            prompts = tensors[f"{side}.prompt"].astype(np.float64)
            vectors = tensors[f"{side}.answer"].astype(np.float64)
            rows = zip(prompts, vectors, tensors[f"{side}.counts"].tolist(), strict=True)
            answers[side] = [EncodedAnswer(row[0], row[1], *row[2]) for row in rows]
    except (OSError, SafetensorError, KeyError, ValueError):
        return {}
    return answers
