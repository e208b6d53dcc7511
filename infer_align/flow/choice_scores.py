"""Score the answers of choices with the configured rewards, each text once."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from infer_align.flow.scoring import log_failure, score_with
from infer_align.objectives import Ensemble
from infer_align.rewards import Reward, RewardScores
from infer_align.types import Array, Candidate, Messages, ScoringUsage

# Texts whose scores are kept, over all rewards.
MAX_TEXTS = 20_000
# Conversations that are scored at once.
MAX_CONCURRENT = 16


def text_hash(*parts: object) -> str:
    """Return a hash of JSON values, such as a conversation and an answer."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class ChoiceScores:
    """Scores of given answers, kept by text: users' choices come again with every request."""

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        count: Callable[[ScoringUsage], None] = lambda _: None,
    ) -> None:
        """Prepare the scoring.

        Args:
            rewards: the configured rewards, by name.
            count: called with the cost of each scoring.
        """
        self._rewards = rewards
        self._count = count
        self._kept: OrderedDict[tuple[str, str], Array] = OrderedDict()
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)

    async def score(
        self,
        features: Sequence[str],
        messages: Messages,
        texts: Sequence[str],
        ensemble: Ensemble,
        deadline: float | None = None,
    ) -> Array:
        """Return the score of each text by each feature: [N, F]; NaN where a reward failed.

        Args:
            features: the F names of rewards, or "reward.attribute".
            messages: the conversation that the texts answer to.
            texts: the N answers.
            ensemble: reduces the members of a reward.
            deadline: seconds of the monotonic clock at which scoring ends.
        """
        # Standardised members would depend on the texts that happen to be scored together.
        single = replace(ensemble, standardize=False)
        names = list(dict.fromkeys(feature.partition(".")[0] for feature in features))
        async with self._slots:
            pending = [self._members(name, messages, texts, deadline) for name in names]
            members = dict(zip(names, await asyncio.gather(*pending), strict=True))
        columns = np.full((len(texts), len(features)), np.nan)
        for t, feature in enumerate(features):
            name, _, attribute = feature.partition(".")
            row = self._rewards[name].attributes.index(attribute) if attribute else 0
            columns[:, t] = single.reduce(members[name][row])
        return columns

    async def _members(
        self, name: str, messages: Messages, texts: Sequence[str], deadline: float | None
    ) -> Array:
        """Return the scores of one reward: [A, K, N]."""
        keys = [(name, text_hash(list(messages), text)) for text in texts]
        scores: dict[tuple[str, str], Array] = {}
        missing: dict[tuple[str, str], str] = {}
        for key, text in zip(keys, texts, strict=True):
            if key in self._kept:
                self._kept.move_to_end(key)
                scores[key] = self._kept[key]
            else:
                missing[key] = text
        if missing:
            candidates = [_candidate(i, text) for i, text in enumerate(missing.values())]
            result = await score_with(self._rewards[name], messages, candidates, deadline)
            self._count(result.usage)
            _log_failure(name, result)
            for i, key in enumerate(missing):
                scores[key] = result.values[:, :, i]
                self._keep(key, scores[key])
        return np.stack([scores[key] for key in keys], axis=-1)

    def _keep(self, key: tuple[str, str], scores: Array) -> None:
        # What failed may work the next time.
        if np.isnan(scores).all():
            return
        self._kept[key] = scores
        while len(self._kept) > MAX_TEXTS:
            self._kept.popitem(last=False)


def _log_failure(name: str, scores: RewardScores) -> None:
    """Log a reward that could not score all answers of a choice."""
    failed = int(np.isnan(scores.values).all(axis=(0, 1)).sum())
    if not failed:
        return
    note = next((note for note in scores.notes if note), "its scores are not numbers")
    fields = {"reward": name, "answers": failed, "reason": note}
    log_failure("reward failed on a choice", fields, scores.failure)


def _candidate(index: int, text: str) -> Candidate:
    message = {"role": "assistant", "content": text}
    return Candidate(index, {"message": message, "finish_reason": "stop"})
