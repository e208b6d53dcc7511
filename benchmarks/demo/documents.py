"""What the demo's language model learns from: the world's conversations, directed ones, and judgements."""

from __future__ import annotations

import random

from benchmarks.demo import direction, judgement
from infer_align.demo import world

__all__ = ["document"]

_KINDS = (world.document, direction.directed, judgement.scored, judgement.compared)
_SHARES = (0.34, 0.36, 0.14, 0.16)


def document(rng: random.Random) -> list[dict[str, str]]:
    """One training conversation; the language model learns its assistant turns."""
    return rng.choices(_KINDS, _SHARES)[0](rng)
