"""VAS on one answer of an upstream: value LMs in this process read it and steer its next token.

The order of a step is `steer`, then the sampler, then `choose`. In shapes, n is the number of
tokens that the upstream lists with their logits, k of candidates that are valued, and M of values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

from infer_align.decoding.siblings import ValueCache, read_tokens
from infer_align.decoding.steering import steer_candidates
from infer_align.steering import Steering
from infer_align.types import Array
from infer_align.values.lookahead import LookaheadValue, ValueLM


class AnswerValues:
    """The values of the next tokens of one answer.

    Its methods block, so they are called in a worker thread, one at a time.

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
        """Read the prompt with each value LM, before the first step.

        Args:
            ids: the tokens of the prompt.
        """
        for value in self._values:
            if value.lm and value.lm not in self._caches:
                cache = read_tokens(value.lm, ids)
                self._caches[value.lm] = ValueCache(value.lm, [0], [len(ids)], cache)

    def steer(self, tokens: Sequence[int], logits: Array) -> Array:
        """Add the weighted values to the logits of the k most likely tokens.

        `choose` must follow, unless the answer ends.

        Args:
            tokens: the n tokens that the upstream lists.
            logits: [n] of these tokens.

        Returns:
            [n] steered logits.
        """
        by_token = dict(zip(tokens, logits.tolist(), strict=True))
        # Without a number of candidates, all tokens of the list are valued.
        k = self._steering.candidates or len(tokens)
        self._valued = most_likely(by_token, k)
        positions = [tokens.index(token) for token in self._valued]
        weights = list(self._steering.beta.values())
        steered = logits.copy()
        if self._steering.tail == "mask":
            steered.fill(-np.inf)
        steered[positions] = steer_candidates(logits[positions], self._evaluate(), weights)
        return steered

    @torch.inference_mode()
    def _evaluate(self) -> Array:
        """Value the answer after each of the k candidates: -> [M, k]."""
        ids = torch.tensor([self._valued])
        # [k, H] of each LM with H values. Values that share an LM share its forward pass.
        by_lm: dict[ValueLM, torch.Tensor] = {}
        for lm, cache in self._caches.items():
            by_lm[lm] = cache.siblings(ids)[0]
        rows: list[torch.Tensor] = []
        for value in self._values:
            if value.lm:
                rows.append(by_lm[value.lm][:, value.index])
        return torch.stack(rows).double().numpy()

    @torch.inference_mode()
    def choose(self, token: int) -> None:
        """Keep the sampled token in the caches, and drop the other candidates."""
        for cache in self._caches.values():
            cache.choose(torch.tensor([token]))


def most_likely(logits: Mapping[int, float], k: int, excluded: Collection[int] = ()) -> list[int]:
    """Return the k most likely tokens, the lower id first among equals.

    Args:
        logits: token -> logit.
        k: the number of tokens; fewer if there are not that many.
        excluded: tokens that are left out.
    """
    tokens = [token for token in logits if token not in excluded]
    tokens.sort(key=lambda token: (-logits[token], token))
    return tokens[:k]
