"""VAS on one answer: the value LMs read it, and reweight the logits of its next token."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

from infer_align.decoding.cache import RowCache
from infer_align.decoding.siblings import ValueCache
from infer_align.decoding.steering import steer_candidates
from infer_align.steering import Steering
from infer_align.types import Array
from infer_align.values.lookahead import LookaheadValue, ValueLM


class AnswerValues:
    """The values of the next tokens of one answer. Its methods run in threads.

    Args:
        values: the values, in the order of the steering.
        steering: their weights, and the tokens that are valued.
    """

    def __init__(self, values: Sequence[LookaheadValue], steering: Steering) -> None:
        self._values = values
        self._steering = steering
        self._caches: dict[ValueLM, ValueCache] = {}
        # The candidates of the latest step.
        self._valued: list[int] = []

    @torch.inference_mode()
    def read_prompt(self, ids: Sequence[int]) -> None:
        """Read the prompt with each value LM."""
        for value in self._values:
            if value.lm and value.lm not in self._caches:
                cache = RowCache()
                positions = torch.arange(len(ids))[None]
                value.lm.forward(torch.tensor([list(ids)]), cache, positions, None)
                self._caches[value.lm] = ValueCache(value.lm, [0], [len(ids)], cache)

    def steer(self, tokens: Sequence[int], logits: Array) -> Array:
        """Add the weighted values to the logits of the k most likely tokens: [V] -> [V].

        `choose` must follow.
        """
        by_token = dict(zip(tokens, logits.tolist(), strict=True))
        self._valued = most_likely(by_token, self._steering.candidates or len(tokens))
        positions = [tokens.index(token) for token in self._valued]
        weights = list(self._steering.beta.values())
        is_masked = self._steering.tail == "mask"
        steered = np.full_like(logits, -np.inf) if is_masked else logits.copy()
        steered[positions] = steer_candidates(logits[positions], self._evaluate(), weights)
        return steered

    @torch.inference_mode()
    def _evaluate(self) -> Array:
        """Value the answer after each of k candidates: -> [M, k]."""
        ids = torch.tensor([self._valued])
        by_lm = {lm: cache.siblings(ids)[0] for lm, cache in self._caches.items()}
        values = [by_lm[value.lm][:, value.index].numpy() for value in self._values if value.lm]
        return np.asarray(values, dtype=np.float64)

    @torch.inference_mode()
    def choose(self, token: int) -> None:
        """Keep the sampled token in the caches, and drop the other candidates."""
        for cache in self._caches.values():
            cache.choose(torch.tensor([token]))


def most_likely(logits: Mapping[int, float], k: int, excluded: Collection[int] = ()) -> list[int]:
    """Return the k most likely tokens, the lower id first among equals."""
    tokens = [token for token in logits if token not in excluded]
    tokens.sort(key=lambda token: (-logits[token], token))
    return tokens[:k]
