"""Score an answer by fitted heads on the vectors of a frozen text encoder.

`infer-align fit reward` makes the file. Each head is a member of the ensemble: they were fitted
with other seeds, on other samples of the pairs and on other features, so that they disagree where
the pairs say little.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from infer_align.errors import ConfigError, Unavailable
from infer_align.messages import message_text
from infer_align.rewards import DESCRIPTION, TIMEOUT, Reward, RewardScores
from infer_align.rewards import _heads as heads
from infer_align.rewards._conversation import check_text_only, turns
from infer_align.rewards._sentences import SentenceEncoder
from infer_align.types import Candidate, Messages, ScoringUsage


@dataclass(frozen=True, slots=True)
class Embedding:
    """Fitted heads on the vectors of a frozen text encoder."""

    path: str = field(
        metadata={"description": "Safetensors file that `infer-align fit reward` has written."}
    )
    encoder: str | None = field(
        default=None,
        metadata={
            "description": "Encoder on this machine: a path, a Hugging Face id, or "
            "package:<name>/<file>. Default: where it was when the heads were fitted."
        },
    )
    device: str = field(
        default="auto",
        metadata={"description": 'torch device. "auto" is a GPU if there is one, else the CPU.'},
    )
    description: str = field(default="", metadata=DESCRIPTION)
    timeout_seconds: float = field(default=60.0, metadata=TIMEOUT)

    def load(self) -> EmbeddingReward:
        """Return the reward. Its files are read by `start`."""
        return EmbeddingReward(self)


plugin = Embedding


class _Loaded(NamedTuple):
    heads: heads.Heads
    encoder: SentenceEncoder


class EmbeddingReward(Reward):
    """The score of each head for each answer, in log-odds of a preference."""

    cost = "reads the conversation and each answer once with the encoder"

    def __init__(self, config: Embedding) -> None:
        self.config = config
        self.timeout_seconds = config.timeout_seconds
        self.description = config.description or f"fitted heads of {config.path}"
        self._loaded: _Loaded | None = None
        # One thread is enough: torch uses every available core by itself.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embedding")

    async def start(self) -> None:
        """Read the heads and load their encoder.

        Raises:
            ConfigError: a file cannot be read, or the encoder is another one than the heads' own.
        """
        loop = asyncio.get_running_loop()
        loaded = await loop.run_in_executor(self._thread, _load, self.config)
        self._loaded = loaded
        fitted = loaded.heads
        self.members = tuple(f"head{index}" for index in range(len(fitted.weights)))
        warning = fitted.facts.get("warning")
        if warning:
            self.warnings = (str(warning),)

    async def close(self) -> None:
        """Free the encoder."""
        self._loaded = None
        await asyncio.to_thread(self._thread.shutdown)

    def check_conversation(self, where: str, messages: Messages) -> None:
        """Refuse a conversation with parts that are no text.

        Raises:
            InvalidRequest: naming `where` and the part.
        """
        check_text_only(where, messages)

    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        """Return [1, K, N] scores. A text that is too long is truncated, with a note.

        Raises:
            Unavailable: the reward is closed.
        """
        if self._loaded is None:
            raise Unavailable("the reward was shut down")
        dialogues: list[tuple[Messages, str]] = []
        for candidate in candidates:
            *earlier, answer = turns(messages, candidate)
            dialogues.append((earlier, message_text(answer)))
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, _score, self._loaded, dialogues)


def _load(config: Embedding) -> _Loaded:
    fitted = heads.read(config.path)
    settings = fitted.encoder
    if config.encoder is not None:
        settings = replace(settings, model=config.encoder)
    encoder = SentenceEncoder(settings, config.device, "embedding")
    digest = encoder.digest()
    if digest != fitted.digest:
        raise ConfigError(
            f"embedding: encoder: {settings.model!r} has the digest {digest}, but the heads of "
            f"{config.path!r} were fitted on {fitted.digest}. Set encoder to the model that they "
            "were fitted on, or fit them again."
        )
    if fitted.weights.shape[1] != len(fitted.views) * encoder.size:
        raise ConfigError(f"embedding: path: {config.path!r} does not fit its own encoder.")
    return _Loaded(fitted, encoder)


def _score(loaded: _Loaded, dialogues: Sequence[tuple[Messages, str]]) -> RewardScores:
    encoded = loaded.encoder.encode(dialogues)
    features = heads.answer_features(encoded, loaded.heads.views, loaded.encoder.size)
    lengths = heads.length_features([answer for _, answer in dialogues])
    values = loaded.heads.score(features, lengths)
    tokens = sum(each.tokens for each in encoded)
    notes = tuple(each.note for each in encoded)
    return RewardScores(np.asarray(values)[None], ScoringUsage(reward_tokens=tokens), notes)
