"""The contexts of one guided draw, and the guided logits of the tokens that they show.

An upstream shows the most likely tokens of each context only. All tokens that any context shows
are compared. `context_reader.py` reads what is hidden of them. Where that is not possible, a hidden
logprob is at most that of the least likely token that is shown, and at most that of everything that
is not; the lesser counts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from infer_align.methods.guidance import guide
from infer_align.steering import Contrast, Guidance
from infer_align.types import Body

# Logprobs are float32, so their probabilities may sum to a little more than 1.
_SMALLEST_REST = 1e-6


@dataclass(frozen=True, slots=True)
class GuidanceContexts:
    """The different bodies of a guided draw, each once.

    Attributes:
        bodies: the request as it is, then those with the prompts of traits in them.
        names: how messages name each body, after "the request".
        params: the field that each body comes from; None for the request as it is.
        pairs: for each contrast, the indices of its body and of its negative body.
        guidance: the contrasts and the limit on implausible tokens.
    """

    bodies: tuple[Body, ...]
    names: tuple[str, ...]
    params: tuple[str | None, ...]
    pairs: tuple[tuple[int, int], ...]
    guidance: Guidance

    @classmethod
    def of(cls, body: Body, guidance: Guidance) -> GuidanceContexts:
        """Return the contexts of a draw with this body."""
        names: list[str] = ["as it is"]
        params: list[str | None] = [None]
        bodies: list[Body] = [body]
        pairs: list[tuple[int, int]] = []

        def index(context: Body, contrast: Contrast, name: str) -> int:
            if context not in bodies:
                bodies.append(context)
                names.append(f"with the {name} of {contrast.trait!r}")
                params.append(f"align.guidance.scale.{contrast.trait}")
            return bodies.index(context)

        for contrast in guidance.contrasts:
            positive = index(contrast.body, contrast, "prompt")
            negative = 0
            if contrast.negative_body is not None:
                negative = index(contrast.negative_body, contrast, "negative prompt")
            pairs.append((positive, negative))
        return cls(tuple(bodies), tuple(names), tuple(params), tuple(pairs), guidance)

    def guided(
        self, tops: Sequence[Mapping[int, float]], excluded: Collection[int] = ()
    ) -> dict[int, float]:
        """Return the guided logits of the tokens that are not masked, by ascending id.

        Args:
            tops: for each context, the logprobs of its most likely tokens.
            excluded: tokens that cannot be sampled.
        """
        tokens = sorted(set().union(*tops).difference(excluded))
        if not tokens:
            return {}
        logprobs = np.array([_logprobs(each, tokens) for each in tops]).reshape(len(tops), -1)
        contexts = logprobs[np.array(self.pairs)]  # [C, 2, V]
        scales = [contrast.scale for contrast in self.guidance.contrasts]
        logits = guide(logprobs[0], contexts, scales, self.guidance.min_p)
        guided: dict[int, float] = {}
        for token, logit in zip(tokens, logits.tolist(), strict=True):
            if logit > -math.inf:
                guided[token] = logit
        return guided


def _logprobs(top: Mapping[int, float], tokens: Sequence[int]) -> list[float]:
    """Return the logprob of each token after one context, or its upper bound."""
    bound = largest_hidden(top)
    return [top.get(token, bound) for token in tokens]


def largest_hidden(top: Mapping[int, float]) -> float:
    """Return the largest logprob that a token can have that a context does not show."""
    rest = 1.0 - sum(math.exp(logprob) for logprob in top.values())
    return min(*top.values(), math.log(max(rest, _SMALLEST_REST)))
