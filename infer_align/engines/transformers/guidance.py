"""Guidance in the embedded engine: the contexts of a draw as tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from infer_align.decoding.guidance import CandidateGuidance, ContextPair
from infer_align.engines.transformers.rows import Guiding
from infer_align.types import Body, Draw


def read_contexts(
    draw: Draw, prompt: list[int], tokenize: Callable[[Draw], list[int]]
) -> tuple[Guiding | None, Mapping[str, int]]:
    """Return the contexts of a draw, and the tokens of the longest context of each trait.

    Prompts of the same tokens are one context, and the model reads it once.

    Args:
        draw: the draw; without guidance there is nothing to read.
        prompt: the tokens of the request as it is.
        tokenize: returns the tokens of the prompt of a draw.
    """
    if not draw.guidance:
        return None, {}
    numbers: dict[tuple[int, ...], int] = {tuple(prompt): 0}

    def number(body: Body | None) -> int:
        if body is None:
            return 0
        ids = tuple(tokenize(replace(draw, body=body)))
        return numbers.setdefault(ids, len(numbers))

    pairs: list[ContextPair] = []
    used: dict[str, tuple[int, ...]] = {}
    for contrast in draw.guidance.contrasts:
        positive, negative = number(contrast.body), number(contrast.negative_body)
        pairs.append(ContextPair(contrast.scale, positive, negative))
        used[contrast.trait] = (0, positive, negative)
    prompts = [list(ids) for ids in numbers]
    longest: dict[str, int] = {}
    for name, contexts in used.items():
        longest[name] = max(len(prompts[i]) for i in contexts)
    candidate = CandidateGuidance(tuple(pairs), len(prompts), draw.guidance.min_p)
    return Guiding(tuple(prompts[1:]), candidate), longest
