"""Derive one seed per candidate from the seed of the request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from infer_align.types import Draw

SEED_RANGE = 2**63
_MASK_64 = 2**64 - 1


def seed_draws(
    draws: tuple[Draw, ...], seed: int, *, requested: bool, ranges: Sequence[int] | None = None
) -> tuple[Draw, ...]:
    """Give every candidate of every draw a seed of its own.

    The first candidate has the request's own seed, so it is the answer that the request gives
    without a selection. The other seeds are mixed from it, so that requests with neighbouring seeds
    share no candidates.

    Args:
        draws: the draws of one plan.
        seed: the seed of the request, 0 to SEED_RANGE - 1.
        requested: True if the client named the seed.
        ranges: number of seeds that are reserved for each draw; by default, one per candidate.
    """
    seeded = []
    first = 0
    for d, draw in enumerate(draws):
        seeds = tuple(candidate_seed(seed, first + i) for i in range(draw.n))
        seeded.append(replace(draw, seeds=seeds, seed_requested=requested))
        first += draw.n if ranges is None else ranges[d]
    return tuple(seeded)


def candidate_seed(seed: int, index: int) -> int:
    """Return the seed of candidate `index`: splitmix64's finish over the seed and the index."""
    if index == 0:
        return seed
    z = (seed * 0xD1342543DE82EF95 + index * 0x9E3779B97F4A7C15) & _MASK_64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK_64
    return (z ^ z >> 31) % SEED_RANGE
