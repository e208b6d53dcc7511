"""Linear heads on the vectors of a frozen encoder, and the file that holds them.

An answer has the features

    answer        the vector of its tokens, read after the conversation, with length 1
    interaction   the entries of that vector times those of the conversation's vector

and a score per head m: weights_m . features + length_m . [l, l²] + bias_m, l = log(1 + characters).
The difference of two scores is the log-odds that the first answer is better.

Shapes: N answers, K heads, D entries of a vector, F features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from infer_align.demo.locate import locate
from infer_align.errors import ConfigError, quote
from infer_align.rewards._sentences import EncodedAnswer, EncoderSettings
from infer_align.types import Array

View: TypeAlias = Literal["answer", "interaction"]
FORMAT = "infer-align embedding reward, version 1"
# The metadata of the file is JSON in one entry.
ENTRY = "reward"
LENGTH_FEATURES = 2


@dataclass(frozen=True, slots=True)
class Heads:
    """K fitted heads.

    Attributes:
        encoder: the frozen encoder.
        digest: of the encoder, see `SentenceEncoder.digest`.
        views: the features of an answer, in their order.
        weights: [K, F].
        length: [K, 2], the weights of the answer's length.
        bias: [K].
        facts: further facts as JSON, such as seeds and held-out figures.
    """

    encoder: EncoderSettings
    digest: str
    views: tuple[View, ...]
    weights: Array
    length: Array
    bias: Array
    facts: Mapping[str, Any] = field(default_factory=dict)

    def score(self, features: Array, lengths: Array) -> Array:
        """Return the scores of answers: [N, F] and [N, 2] -> [K, N]."""
        scores: Array = self.weights @ features.T + self.length @ lengths.T + self.bias[:, None]
        return scores


def answer_features(encoded: Sequence[EncodedAnswer], views: Sequence[View], size: int) -> Array:
    """Return the features of N answers: [N, F].

    Args:
        encoded: the answers as the encoder read them.
        views: the features, in their order.
        size: number of entries of a vector, D.
    """
    blocks: list[Array] = [np.zeros((len(encoded), 0))]
    answers = _unit([each.answer for each in encoded], size)
    for view in views:
        if view == "answer":
            blocks.append(answers)
        else:
            prompts = _unit([each.prompt for each in encoded], size)
            # Of about the size of a vector with length 1, whatever D is.
            blocks.append(prompts * answers * np.sqrt(size))
    return np.concatenate(blocks, axis=1)


def length_features(texts: Sequence[str]) -> Array:
    """Return [l, l²] with l = log(1 + characters) for each text: [N, 2]."""
    logs = np.log1p(np.array([len(text) for text in texts], dtype=np.float64))
    return np.stack([logs, logs**2], axis=1)


def write(path: Path, heads: Heads) -> None:
    """Write heads to a safetensors file.

    Raises:
        ConfigError: the file cannot be written.
    """
    tensors = {"weights": heads.weights, "length": heads.length, "bias": heads.bias}
    facts = {
        "format": FORMAT,
        "encoder": asdict(heads.encoder),
        "encoder_digest": heads.digest,
        "features": heads.views,
        "facts": heads.facts,
    }
    # One entry: safetensors writes several in a random order, and equal fits are equal files.
    metadata = {ENTRY: json.dumps(facts)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: np.ascontiguousarray(each) for name, each in tensors.items()}, path, metadata
        )
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{str(path)!r}: cannot be written: {error}") from error


def read(name: str) -> Heads:
    """Read heads from a safetensors file.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    path = Path(locate(name))
    try:
        with safe_open(path, "np") as opened:
            metadata = opened.metadata() or {}
            names = opened.keys()
            tensors = {each: np.array(opened.get_tensor(each)) for each in names}
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"embedding: path: {name!r} cannot be read: {reason}.") from error
    try:
        facts = json.loads(metadata.get(ENTRY, "{}"))
        if facts.get("format") != FORMAT:
            raise ConfigError(
                f"embedding: path: {name!r} has the format {quote(facts.get('format'))}; must be a "
                "file that `infer-align fit reward` has written."
            )
        heads = Heads(
            EncoderSettings(**facts["encoder"]),
            facts["encoder_digest"],
            tuple(facts["features"]),
            tensors["weights"],
            tensors["length"],
            tensors["bias"],
            facts["facts"],
        )
        _check(heads)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"embedding: path: {name!r} is damaged: {error}. Fit the reward again."
        ) from error
    return heads


def _check(heads: Heads) -> None:
    """Refuse heads whose parts do not fit together.

    Raises:
        ValueError: naming the part.
    """
    members = len(heads.weights)
    if heads.length.shape != (members, LENGTH_FEATURES) or heads.bias.shape != (members,):
        raise ValueError("weights, length and bias are of different numbers of members")
    if not set(heads.views) <= set(get_args(View)):
        raise ValueError(f"features {quote(heads.views)} are unknown")
    for name in ("weights", "length", "bias"):
        if not np.isfinite(getattr(heads, name)).all():
            raise ValueError(f"{name} holds numbers that are not finite")


def _unit(vectors: Sequence[Array], size: int) -> Array:
    rows = np.stack(vectors) if vectors else np.zeros((0, size))
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Array = rows / np.where(lengths > 0, lengths, 1.0)
    return unit
